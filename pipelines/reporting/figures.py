"""Curves of a report, as SVG: sharp on paper and on a phone, and inside an <img> without ids or scripts that act."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.pages import data_uri
from pipelines.reporting.facts import TERM, Curves

BLUE = "#3567b7"
SIZE = (4.6, 2.7)


def svg(draw: Callable[[], Figure]) -> str:
    """What `src` of an <img> takes."""
    out = io.BytesIO()
    style: Any = {
        "text.parse_math": False,  # a class may be called $x$
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#8a94a3",
        "lines.linewidth": 1.6,
        "svg.hashsalt": "repsep",  # the same figure is the same bytes
    }
    with matplotlib.rc_context(style):
        draw().savefig(out, format="svg", metadata={"Date": None})
    return data_uri(out.getvalue(), "svg+xml")


def training_figures(curves: Curves) -> list[dict[str, str]]:
    """Title and picture of each curve that was logged."""
    drawn: list[tuple[str, Callable[[], Figure]]] = []
    if "val/miou" in curves:
        drawn.append(("mIoU on validation", lambda: _curve(curves["val/miou"], marker="o")))
    if "loss" in curves:
        drawn.append(("Loss", lambda: _curve(curves["loss"])))
    terms = {name.removeprefix(TERM): curve for name, curve in curves.items() if name.startswith(TERM)}
    if terms:
        drawn.append(("Terms of the loss, before their weights", lambda: _terms(terms)))
    if "lr" in curves:
        drawn.append(("Learning rate", lambda: _curve(curves["lr"])))
    if "images_per_s" in curves:
        drawn.append(("Images per second", lambda: _curve(curves["images_per_s"])))
    if "data_wait_share" in curves:
        drawn.append(("Share of the time spent waiting for data", lambda: _curve(curves["data_wait_share"])))
    return [{"title": title, "picture": svg(draw)} for title, draw in drawn]


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.grid(color="0.92")
    return figure, axes


def _curve(curve: list[tuple[int, float]], marker: str = "") -> Figure:
    figure, axes = _axes()
    axes.plot(*zip(*curve, strict=True), color=BLUE, marker=marker or ("o" if len(curve) == 1 else ""), markersize=4)
    axes.set_ylim(bottom=0)
    return figure


def _terms(terms: Mapping[str, list[tuple[int, float]]]) -> Figure:
    figure, axes = _axes()
    for number, (name, curve) in enumerate(terms.items()):
        axes.plot(*zip(*curve, strict=True), label=name, linestyle="-" if number < 10 else "--")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure
