"""The sweep's page: what won and why, every trial, what mattered. One file: no request, no script."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.config import SweepConfig
from pipelines.dataset import Dataset
from pipelines.pages import data_uri, render
from pipelines.sweeping.comparison import LEVEL, RULE, Comparison
from pipelines.sweeping.importance import FEWEST, Importance
from pipelines.sweeping.points import searched
from pipelines.sweeping.records import FINISHED, Trial

COLOURS = colormaps["viridis"]
OFF_BELOW = 0.4
"""How far below a weight's range, in decades, `off` is drawn."""


def page_of(
    trials: Sequence[Trial],
    best: Trial,
    winner: Trial,
    compared: Comparison | None,
    found: Sequence[Importance],
    first: int,
    config: SweepConfig,
    dataset: Dataset,
    folder: str,
) -> str:
    """`first` is the step at which all trials were validated; `found` is about their scores there."""
    ordered = sorted(trials, key=lambda trial: trial.rank, reverse=True)
    usable = [trial for trial in ordered if not trial.failed]
    return render(
        "sweep.html",
        dataset=dataset.manifest["name"],
        images={name: split["images"] for name, split in dataset.manifest["splits"].items()},
        folder=folder,
        config=config,
        columns=list(searched(best.point.config, config.search)),
        rows=[_row(trial, config, trial is best) for trial in ordered],
        best=best,
        winner=winner,
        compared=compared,
        level=f"{LEVEL:.0%}",
        rule=RULE,
        importances=found,
        fewest=FEWEST,
        first=first,
        finished=sum(trial.ended == FINISHED for trial in usable),
        stopped=sum(trial.ended != FINISHED for trial in usable),
        failed=len(trials) - len(usable),
        parallel=data_uri(parallel_coordinates(usable, best, config), "png"),
        weights=data_uri(weights_plot(trials, config), "png"),
        curves=data_uri(_curves(usable, best), "png"),
        pairs=data_uri(_pairs(compared), "png") if compared is not None and compared.difference is not None else None,
    )


def _row(trial: Trial, config: SweepConfig, is_best: bool) -> dict[str, Any]:
    values = searched(trial.point.config, config.search)
    cells = [
        "off" if name.startswith("w.") and value == 0 else (f"{value:.4g}" if isinstance(value, float) else value)
        for name, value in values.items()
    ]
    return {"trial": trial, "cells": cells, "is_best": is_best}


def parallel_coordinates(trials: Sequence[Trial], best: Trial, config: SweepConfig) -> bytes:
    """A line for each trial over an axis for each parameter and the result; colour and thickness by the result."""
    settings = [searched(trial.point.config, config.search) for trial in trials]
    names = list(settings[0])
    figure = Figure(figsize=(max(8, 1.5 * len(names) + 3), 4.2), layout="constrained")
    axes = figure.subplots()
    columns = [_axis(axes, x, name, [each[name] for each in settings]) for x, name in enumerate(names)]
    columns.append(_axis(axes, len(names), "mIoU", [trial.miou for trial in trials], log=False))
    lines_TX = np.array(columns).T
    result = lines_TX[:, -1]
    for number in np.argsort(result):
        trial, colour = trials[number], COLOURS(0.9 * result[number])
        style = "-" if trial.ended == FINISHED else ":"
        axes.plot(
            lines_TX[number], style, color=colour, linewidth=3 if trial is best else 1.3, marker="o", markersize=3
        )
    axes.set(xlim=(-0.3, len(names) + 0.6), ylim=(-0.1, 1.12), yticks=[])
    axes.set_xticks(range(len(names) + 1), [*names, "mIoU"])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _png(figure)


def _axis(axes: Axes, x: int, name: str, values: Sequence[float | str], log: bool = True) -> np.ndarray[Any, Any]:
    """Draw one axis with its labels; the values' heights on it, 0 to 1."""
    axes.axvline(x, 0.08, 0.92, color="#b9c0ca", linewidth=1)
    if isinstance(values[0], str):
        labels = sorted({str(value) for value in values})
        at = {label: number / (len(labels) - 1) if len(labels) > 1 else 0.5 for number, label in enumerate(labels)}
        for label, height in at.items():
            axes.text(x + 0.04, height + 0.02, label.replace(" (", "\n("), fontsize=7)
        return np.array([at[str(value)] for value in values])
    numbers = np.array([float(value) for value in values])
    on = numbers[numbers > 0]
    if not log or len(on) == 0:
        heights = numbers
    else:
        off_at = np.log10(on.min()) - OFF_BELOW
        heights = np.where(numbers > 0, np.log10(np.where(numbers > 0, numbers, 1)), off_at)
    span = float(np.ptp(heights))
    heights = (heights - heights.min()) / span if span > 0 else np.full(len(heights), 0.5)
    for number in {int(np.argmin(heights)), int(np.argmax(heights))}:
        text = "off" if log and numbers[number] == 0 else f"{numbers[number]:.3g}"
        axes.text(x + 0.04, heights[number] + 0.02, text, fontsize=7)
    return heights


def weights_plot(trials: Sequence[Trial], config: SweepConfig) -> bytes:
    """The result against each number that was searched, one colour for each backbone."""
    finished = [trial for trial in trials if not trial.failed]
    settings = [searched(trial.point.config, config.search) for trial in finished]
    names = [name for name, value in settings[0].items() if not isinstance(value, str)]
    figure = Figure(figsize=(max(4.0, 2.4 * len(names)), 3.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(names), sharey=True))
    backbones = sorted({str(each["backbone"]) for each in settings})
    for axes, name in zip(panels, names, strict=True):
        for backbone in backbones:
            mine = [n for n, each in enumerate(settings) if each["backbone"] == backbone]
            axes.scatter([settings[n][name] for n in mine], [finished[n].miou for n in mine], s=18, label=backbone)
        if name.startswith("w."):
            axes.set_xscale("symlog", linthresh=0.01)
            axes.set_xlim(left=-0.001)
            axes.set_xticks([0, 0.01, 0.1, 1], ["off", "0.01", "0.1", "1"])
        else:
            axes.set_xscale("log")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mIoU on the held-out piece", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=len(backbones))
    return _png(figure)


def _curves(trials: Sequence[Trial], best: Trial) -> bytes:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for trial in reversed(trials):
        colour = "#c2410c" if trial is best else "#3567b7" if trial.ended == FINISHED else "#9aa5b4"
        axes.plot(*zip(*trial.curve, strict=True), marker="o", markersize=3, color=colour, alpha=0.9)
    axes.set(xlabel="step", ylim=(0, None))
    axes.set_ylabel("mIoU on the held-out piece", fontsize=8)
    axes.grid(alpha=0.3)
    return _png(figure)


def _pairs(compared: Comparison) -> bytes:
    """The differences by seed, their mean and its interval, against zero."""
    assert compared.difference is not None
    differences = [pair.difference for pair in compared.pairs if pair.difference is not None]
    figure = Figure(figsize=(7, 1.5), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#1c2430", linewidth=1)
    axes.plot(differences, [1] * len(differences), "o", color="#3567b7")
    if compared.low is not None and compared.high is not None:
        axes.plot([compared.low, compared.high], [0, 0], color="#c2410c", linewidth=3)
    axes.plot([compared.difference], [0], "D", color="#c2410c")
    axes.set(ylim=(-0.7, 1.7), xlabel="mIoU on val, best minus default")
    axes.set_yticks([0, 1], ["mean and interval", "each seed"])
    axes.grid(axis="x", alpha=0.3)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()
