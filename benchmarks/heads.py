"""Our model against the decoders people put on the same backbone: accuracy against cost.

    PYTHONPATH=. python benchmarks/heads.py run --seeds 100,101     (after `ablation.py warm --study longer`)
    PYTHONPATH=. python benchmarks/heads.py cost
    PYTHONPATH=. python benchmarks/heads.py show

Training is the ablation's longer study, the same for all; its records are shared with the ablation. `cost` measures
parameters, FLOPs, latency and peak memory at 512 x 512 and wants a machine on which nothing else computes.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TIMM_FUSED_ATTN", "0")  # the fused one is slower backwards on a CPU

from matplotlib.figure import Figure

from benchmarks.evidence.arms import ALL, HEADS, STUDIES
from benchmarks.evidence.cost import costs
from benchmarks.evidence.runs import RESULTS, Run, finished, perform_all
from benchmarks.evidence.tables import differences, of_training

FILE, COSTS, PLOT = RESULTS / "runs.jsonl", RESULTS / "costs.json", RESULTS / "heads.png"
PEERS = [arm.name for arm in HEADS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "cost", "show"])
    parser.add_argument("--arms", default=",".join(PEERS))
    parser.add_argument("--seeds", default="100,101,102")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    names = options.arms.split(",")
    if options.action == "run":
        runs = [Run(ALL[name], int(seed), STUDIES["longer"]) for seed in options.seeds.split(",") for name in names]
        for record in perform_all(runs, FILE, options.jobs):
            print(record["arm"], record["seed"], f"mIoU {record['miou']:.4f}", flush=True)
    elif options.action == "cost":
        COSTS.write_text(json.dumps(_costs() | costs(names), indent=1) + "\n")
        print(COSTS.read_text())
    else:
        arms = of_training(finished(FILE), STUDIES["longer"].digest)
        shown = {name: arms[name] for name in arms if name in _costs()}
        print(table(shown))
        ours = [name for name in shown if name not in PEERS]
        print()
        print(differences(shown, [(mine, peer) for mine in ours for peer in PEERS]))
        plot(shown).savefig(PLOT, dpi=120)


def _costs() -> dict[str, dict[str, Any]]:
    return json.loads(Path(COSTS).read_text()) if Path(COSTS).exists() else {}


def table(arms: dict[str, Any]) -> str:
    """Markdown: accuracy (mean over seeds, their range) and cost of each."""
    keys = ("parameters_M", "gflops", "ms_1", "ms_8", "peak_mb_1", "peak_mb_8")
    heads = ("M parameters", "GFLOP", "ms, batch 1", "ms an image, batch 8", "peak MB, 1", "peak MB, 8")
    lines = [f"| | seeds | mIoU | range | {' | '.join(heads)} |", "|" + "---|" * (4 + len(keys))]
    for name, seeds in arms.items():
        found = [record["miou"] for record in seeds.values()]
        cells = [str(_costs()[name][key]) for key in keys]
        middle = sum(found) / len(found)
        span = f"{min(found):.3f} to {max(found):.3f}"
        lines.append(f"| {name} | {len(found)} | {middle:.4f} | {span} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(arms: dict[str, Any]) -> Figure:
    """mIoU over FLOPs and over latency: each seed a dot, the mean a bar."""
    drawn = Figure(figsize=(11, 4.5), layout="constrained")
    panels = (("gflops", "GFLOP at 512 x 512"), ("ms_8", "ms an image at 512 x 512, batch 8, one CPU thread, bf16"))
    axes = drawn.subplots(1, 2, sharey=True)
    for axis, (key, label) in zip(axes, panels, strict=True):
        for name, seeds in arms.items():
            x = _costs()[name][key]
            found = [record["miou"] for record in seeds.values()]
            colour = "#0072b2" if name not in PEERS else "#d55e00"
            axis.plot([x] * len(found), found, ".", color=colour, alpha=0.5)
            axis.plot(x, sum(found) / len(found), "_", color=colour, markersize=16, markeredgewidth=3)
            axis.annotate(name, (x, sum(found) / len(found)), xytext=(8, 6), textcoords="offset points", fontsize=10)
        axis.set_xlabel(label)
        axis.margins(x=0.2, y=0.1)
        axis.grid(color="0.92")
    axes[0].set_ylabel("mIoU on CamVid val")
    return drawn


if __name__ == "__main__":
    main()
