"""Records to tables: means over seeds, and differences paired by seed with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.sweeping.comparison import interval

Records = Mapping[tuple[str, str, int], Mapping[str, Any]]
METRICS = {
    "miou": "mIoU",
    "whole_miou": "mIoU, whole images",
    "boundary_miou": "boundary mIoU",
    "aacc": "pixel accuracy",
    "retention": "retention",
    "corrupted_miou": "corrupted mIoU",
    "ece": "ECE",
}


def of_training(records: Records, digest: str) -> dict[str, dict[int, Mapping[str, Any]]]:
    """{arm: {seed: record}} of one way of training, in the order in which the arms were first finished."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for (trained, arm, seed), record in records.items():
        if trained == digest:
            found.setdefault(arm, {})[seed] = record
    return found


def means(arms: Mapping[str, Mapping[int, Mapping[str, Any]]], what: Mapping[str, str]) -> str:
    """A Markdown table: a line for each arm, the mean over its seeds of each metric."""
    lines = ["| arm | | seeds | " + " | ".join(METRICS.values()) + " |", "|" + "---|" * (3 + len(METRICS))]
    for arm, seeds in arms.items():
        cells = [f"{sum(r[m] for r in seeds.values()) / len(seeds):.4f}" for m in METRICS]
        lines.append(f"| {arm} | {what.get(arm, '')} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(
    arms: Mapping[str, Mapping[int, Mapping[str, Any]]],
    pairs: Sequence[tuple[str, str]],
    shown: Sequence[str] = ("miou", "whole_miou", "boundary_miou", "retention", "corrupted_miou"),
) -> str:
    """A Markdown table: first minus second, paired by seed, with the 95 % interval."""
    lines = ["| difference | pairs | " + " | ".join(METRICS[m] for m in shown) + " |", "|" + "---|" * (2 + len(shown))]
    for first, second in pairs:
        seeds = sorted(arms.get(first, {}).keys() & arms.get(second, {}).keys())
        if seeds:
            cells = [told([arms[first][s][m] - arms[second][s][m] for s in seeds]) for m in shown]
            lines.append(f"| {first} - {second} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def told(values: Sequence[float]) -> str:
    """Mean and interval; bold where the interval leaves 0 out."""
    mean, half = interval(values)
    if half is None:
        return f"{mean:+.4f} (one pair)"
    text = f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"
    return f"**{text}**" if abs(mean) > half else text
