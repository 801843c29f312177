"""Which part of the model helps, by how much, and at what cost? The protocol is in `benchmarks/README.md`.

    PYTHONPATH=. python benchmarks/ablation.py warm --study longer
    PYTHONPATH=. python benchmarks/ablation.py run --study longer --arms baseline,local,full --seeds 100,101,102
    PYTHONPATH=. python benchmarks/ablation.py show --study longer       (tables; the diagnostics' figure)

Runs are taken one after the other, `--jobs` at a time, each with one thread; what is finished is not run again, and a
run that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several runs share the machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TIMM_FUSED_ATTN", "0")  # the fused one is slower backwards on a CPU

from benchmarks.evidence.arms import ALL, PARTS, STUDIES
from benchmarks.evidence.runs import BASELINE, RESULTS, Run, finished, perform_all, prepare
from benchmarks.evidence.tables import differences, means, of_training
from benchmarks.separation import figure
from repsep_model.diagnostics import MapMeasures, SeparationReport, mean_report

FILE, PLOT = RESULTS / "runs.jsonl", RESULTS / "diagnostics.png"
SAID = ("arm", "seed", "miou", "whole_miou", "boundary_miou", "retention", "corrupted_miou", "train_cpu_s", "iou")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["warm", "run", "show"])
    parser.add_argument("--study", choices=list(STUDIES), default="search")
    parser.add_argument("--arms", default=",".join(arm.name for arm in PARTS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--ours", default="full", help="the arm whose diagnostics are drawn beside the baseline's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    training = STUDIES[options.study]
    if options.action == "warm":
        print(f"warm start: {prepare(training):.0f} CPU s")
    elif options.action == "run":
        seeds, arms = map(int, options.seeds.split(",")), options.arms.split(",")
        runs = [Run(ALL[name], seed, training) for seed in seeds for name in arms]
        for record in perform_all(runs, FILE, options.jobs):
            print(json.dumps({name: record[name] for name in SAID}), flush=True)
    else:
        arms = of_training(finished(FILE), training.digest)
        pairs = [(name, "local") for name in arms if name != "local"] + [(options.ours, BASELINE.name)]
        print(means(arms, {name: arm.what for name, arm in ALL.items()}))
        print()
        print(differences(arms, pairs))
        if options.study == "longer" and {BASELINE.name, options.ours} <= arms.keys():
            pair = {name: diagnosed(arms[name]) for name in (BASELINE.name, options.ours)}
            figure(pair, "Means over the seeds and 11 val images.").savefig(PLOT, dpi=110)


def diagnosed(seeds: Mapping[int, Mapping[str, Any]]) -> dict[str, MapMeasures]:
    """Each map's measures, means over the seeds."""
    every = [{name: MapMeasures(**row) for name, row in record["diagnostics"].items()} for record in seeds.values()]
    return dict(mean_report([SeparationReport(rows) for rows in every]).maps)


if __name__ == "__main__":
    main()
