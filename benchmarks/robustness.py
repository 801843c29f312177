"""What of the mIoU is left on corrupted images? The full grid, 16 corruptions in 5 severities, of trained arms.

    PYTHONPATH=. python benchmarks/robustness.py run --seeds 100,101,102
    PYTHONPATH=. python benchmarks/robustness.py show

On one val image in `--every`; what is measured is not measured again. Needs the arms' weights, which `ablation.py run
--study longer` leaves under `.repsep/evidence/`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TIMM_FUSED_ATTN", "0")  # the fused one is slower backwards on a CPU

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.evidence import data
from benchmarks.evidence.arms import ALL, STUDIES
from benchmarks.evidence.runs import RESULTS, Run, by_class, corrupted, score, trained
from benchmarks.evidence.tables import differences
from repsep_model.corruptions import CATEGORIES, CORRUPTIONS, SEVERITIES
from repsep_model.robustness import retention

FILE, PLOT = RESULTS / "robustness.jsonl", RESULTS / "robustness.png"
CLEAN = "clean"
LEARNED = 0.3
SHOWN = ("retention", "corrupted_miou")
PAIRS = [("full", "local"), ("full", "baseline"), ("local", "baseline")]


def measure(arm: str, seed: int, name: str, every: int) -> dict[str, Any]:
    """mIoU and IoU by class at the five severities of a corruption, or of the clean images."""
    torch.set_num_threads(1)
    _, judged = data.read("camvid", "final")
    few = judged.every(every)
    record = {"arm": arm, "seed": seed, "corruption": name, "images": len(few)}
    with ALL[arm].change():
        model = trained(Run(ALL[arm], seed, STUDIES["longer"]), len(judged.classes))
        if name == CLEAN:
            found = score(model, few)
            return record | {"miou": {"0": found["miou"]}, "iou": {"0": found["iou"]}}
        grid = corrupted(model, few, tuple((name, severity) for severity in SEVERITIES))
    miou = {str(severity): round(scores.miou, 5) for (_, severity), scores in grid.items()}
    iou = {str(severity): by_class(judged.classes, scores) for (_, severity), scores in grid.items()}
    return record | {"miou": miou, "iou": iou}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "show"])
    parser.add_argument("--arms", default="baseline,local,full,upernet")
    parser.add_argument("--seeds", default="100")
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    arms = options.arms.split(",")
    if options.action == "show":
        if (missing := _missing(arms)) is not None:
            raise SystemExit(f"{missing} is not measured yet: run the action `run` to its end")
        for classes in ((), learned(arms)):
            if classes:
                print(
                    f"\nOnly {', '.join(classes)}, which every arm knows (IoU of {LEARNED} or more on clean images):\n"
                )
            print(table(arms, classes))
            print()
            print(differences(by_seed(arms, classes), PAIRS, SHOWN))
        figure(arms).savefig(PLOT, dpi=120)
        return
    done = {(r["arm"], r["seed"], r["corruption"]) for r in _records()}
    names = [CLEAN, *CORRUPTIONS]
    every = [(arm, int(seed), name) for seed in options.seeds.split(",") for name in names for arm in arms]
    wanted = [each for each in every if each not in done]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(measure, *each, options.every) for each in wanted]):
            with FILE.open("a") as lines:
                lines.write(json.dumps(future.result()) + "\n")
            print(json.dumps(future.result()), flush=True)


def _records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def _missing(arms: Sequence[str]) -> tuple[str, int, str] | None:
    """A point without which the arms would be compared on different corruptions."""
    done = {(r["arm"], r["seed"], r["corruption"]) for r in _records() if r["arm"] in arms}
    begun = {(arm, seed) for arm, seed, _ in done}
    return next(
        ((*each, name) for each in sorted(begun) for name in (CLEAN, *CORRUPTIONS) if (*each, name) not in done), None
    )


def _of(arm: str, classes: Sequence[str] = (), seed: int | None = None) -> tuple[float, dict[tuple[str, int], float]]:
    """The clean mIoU, of these classes or of all, and that at each point of the grid; means over the seeds."""
    found: dict[tuple[str, int], list[float]] = {}
    for record in _records():
        if record["arm"] == arm and seed in (None, record["seed"]):
            for severity, iou in record["iou"].items():
                here = found.setdefault((record["corruption"], int(severity)), [])
                here.append(float(np.mean([iou[name] for name in classes or iou])))
    points = {point: float(np.mean(seeds)) for point, seeds in found.items()}
    return points.pop((CLEAN, 0)), points


def by_seed(arms: Sequence[str], classes: Sequence[str] = ()) -> dict[str, dict[int, dict[str, float]]]:
    """Retention and corrupted mIoU of each arm and seed, over these classes or all."""
    found: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in arms}
    for record in _records():
        arm, seed = record["arm"], record["seed"]
        if arm in found and seed not in found[arm]:
            clean, points = _of(arm, classes, seed)
            mean = float(np.mean(list(points.values())))
            found[arm][seed] = {"retention": retention(clean, points).overall, "corrupted_miou": mean}
    return found


def learned(arms: Sequence[str]) -> list[str]:
    """The classes that every arm knows on clean images."""
    cleans = [r["iou"]["0"] for r in _records() if r["corruption"] == CLEAN and r["arm"] in arms]
    return [name for name in cleans[0] if all(iou[name] >= LEARNED for iou in cleans)]


def table(arms: Sequence[str], classes: Sequence[str] = ()) -> str:
    """Markdown: retention by category; behind it the mean corrupted mIoU, which a lower clean mIoU cannot raise."""
    lines = ["| | clean mIoU | " + " | ".join(CATEGORIES) + " | overall | corrupted mIoU |", "|" + "---|" * 8]
    for arm in arms:
        clean, points = _of(arm, classes)
        kept = retention(clean, points)
        cells = [f"{kept.categories[name]:.3f}" for name in CATEGORIES]
        mean = float(np.mean(list(points.values())))
        lines.append(f"| {arm} | {clean:.4f} | {' | '.join(cells)} | {kept.overall:.3f} | {mean:.4f} |")
    return "\n".join(lines)


def figure(arms: list[str]) -> Figure:
    """A panel for each category: mIoU over severity, mean of its corruptions."""
    drawn = Figure(figsize=(13, 3.8), layout="constrained")
    for axis, (category, names) in zip(
        drawn.subplots(1, len(CATEGORIES), sharey=True), CATEGORIES.items(), strict=True
    ):
        for arm, colour, style in zip(
            arms, ("#d55e00", "#009e73", "#0072b2", "0.4"), ("o-", "^-", "s-", "d-"), strict=False
        ):
            clean, points = _of(arm)
            means = [float(np.mean([points[name, s] for name in names])) for s in SEVERITIES]
            axis.plot([0, *SEVERITIES], [clean, *means], style, color=colour, label=arm)
        axis.set_title(category)
        axis.set_xlabel("severity (0: clean)")
        axis.grid(color="0.92")
        if category == next(iter(CATEGORIES)):
            axis.set_ylabel("mIoU")
            axis.legend(frameon=False)
    return drawn


if __name__ == "__main__":
    main()
