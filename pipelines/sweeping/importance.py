"""Which of what was searched goes with a better result, honestly for few trials.

Ranks instead of values, so that one lucky trial does not decide. A number (a weight, the learning rate; off counts as
below every weight): Spearman's correlation, squared. A choice (backbone, separation): eta squared of the ranks, the
share of their variance that lies between the choices. Both are shares of variance, and both are above zero by chance
alone when trials are few: the p-value is the share of random re-orderings that do as well, and what chance gives on
average is taken off. Each parameter is looked at alone, so two that were drawn alike by accident share the credit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FEWEST = 5
REORDERINGS = 4999
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Importance:
    """Of one parameter. `share` of the rank variance beyond chance, 0 to 1; `p` is one test of several, uncorrected."""

    name: str
    share: float
    p: float
    how: str


def importances(settings: Sequence[Mapping[str, float | str]], scores: Sequence[float]) -> list[Importance]:
    """For trials with these settings and scores, most important first; none for fewer than 5 trials."""
    if len(scores) < FEWEST:
        return []
    ranks = stats.rankdata(scores)
    if np.ptp(ranks) == 0:
        return []
    columns = {name: [each[name] for each in settings] for name in settings[0]}
    found = [_importance(name, values, ranks) for name, values in columns.items() if len(set(values)) > 1]
    return sorted(found, key=lambda i: (-i.share, i.p, i.name))


def _importance(name: str, values: Sequence[float | str], ranks: Floats) -> Importance:
    rng = np.random.default_rng(0)
    orders = rng.permuted(np.tile(ranks, (REORDERINGS, 1)), axis=1)
    if isinstance(values[0], str):
        labels = [str(value) for value in values]
        explained, by_chance = (_between(labels, r) for r in (ranks[None], orders))
        means = {label: ranks[[each == label for each in labels]].mean() for label in labels}
        how = f"best: {max(means, key=lambda label: means[label])}"
    else:
        places = stats.rankdata(np.asarray(values, float))
        explained, by_chance = (_correlation(places, r) ** 2 for r in (ranks[None], orders))
        how = "more is better" if _correlation(places, ranks[None])[0] > 0 else "less is better"
    share, chance = float(explained[0]), float(by_chance.mean())
    p = (1 + int((by_chance >= share - 1e-12).sum())) / (1 + REORDERINGS)
    # Where every trial made a choice of its own, any order is explained in full.
    beyond = 0.0 if chance > 1 - 1e-9 else max(0.0, (share - chance) / (1 - chance))
    return Importance(name, beyond, p, how)


def _correlation(places_N: Floats, ranks_RN: Floats) -> Floats:
    a_N, b_RN = places_N - places_N.mean(), ranks_RN - ranks_RN.mean(axis=1, keepdims=True)
    correlation: Floats = (b_RN @ a_N) / np.sqrt((a_N**2).sum() * (b_RN**2).sum(axis=1))
    return correlation


def _between(labels: Sequence[str], ranks_RN: Floats) -> Floats:
    """Eta squared: the share of the variance that lies between the groups."""
    mean = ranks_RN.mean(axis=1, keepdims=True)
    members = [np.array([each == label for each in labels]) for label in sorted(set(labels))]
    between = sum(m.sum() * (ranks_RN[:, m].mean(axis=1) - mean[:, 0]) ** 2 for m in members)
    share: Floats = between / ((ranks_RN - mean) ** 2).sum(axis=1)
    return share
