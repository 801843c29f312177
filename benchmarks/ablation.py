"""Which part of the model helps, by how much, and at what cost?

    PYTHONPATH=. python benchmarks/ablation.py run --study search --jobs 2
    PYTHONPATH=. python benchmarks/ablation.py show

The protocol is in `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several runs share the machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from benchmarks.evidence import formulations as tried
from benchmarks.evidence.runs import BASELINE, RESULTS, Arm, Run, Training, perform_all, prepare

LOCAL = {"separation": "none", "cross_attention": 0}
ARMS = [
    BASELINE,
    Arm("local", "+ local pathway", LOCAL),
    Arm("full", "+ region separation + cross-attention (the default)"),
    Arm("sas-region", "local pathway + region separation", {"separation": "region", "cross_attention": 0}),
    Arm("sas-local", "local pathway + local separation", {"separation": "local", "cross_attention": 0}),
    Arm("dca", "local pathway + cross-attention", {"separation": "none"}),
    Arm("no-discrepancy", "local pathway without the discrepancy", LOCAL | {"local_discrepancy": False}),
    Arm("uniform", "local pathway with a uniform kernel", LOCAL | {"uniform_smoothing": True}),
    Arm("unsupervised", "full, attention without supervision", {"attention_supervision": False}),
    Arm("balanced", "full, patch separation by class", change=tried.patch_balanced),
    Arm("contrast", "full, patch separation by contrast", change=tried.patch_contrast),
    Arm("dice", "full, attention as mask by Dice", change=tried.attention_dice),
    Arm("nonlinear", "full, region separation by an MLP", change=tried.region_nonlinear),
    Arm(
        "new",
        "full, contrast + Dice + MLP",
        change=tried.together(tried.patch_contrast, tried.attention_dice, tried.region_nonlinear),
    ),
]
TRAININGS = {
    "search": Training("camvid", "search", 600),
    "final": Training("camvid", "final", 600),
}

SAID = ("arm", "seed", "miou", "whole_miou", "boundary_miou", "retention", "corrupted_miou", "train_cpu_s", "iou")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["warm", "run", "show"])
    parser.add_argument("--study", choices=list(TRAININGS), default="search")
    parser.add_argument("--arms", default=",".join(arm.name for arm in ARMS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.action == "warm":
        print(f"warm start: {prepare(TRAININGS[options.study]):.0f} CPU s")
        return
    by_name = {arm.name: arm for arm in ARMS}
    runs = [
        Run(by_name[name], int(seed), TRAININGS[options.study])
        for seed in options.seeds.split(",")
        for name in options.arms.split(",")
    ]
    for record in perform_all(runs, RESULTS / "ablation.jsonl", options.jobs):
        print(
            {
                k: v
                for k, v in record.items()
                if k
                in (
                    "arm",
                    "seed",
                    "miou",
                    "whole_miou",
                    "boundary_miou",
                    "aacc",
                    "retention",
                    "corrupted_miou",
                    "train_cpu_s",
                    "judge_cpu_s",
                    "iou",
                )
            },
            flush=True,
        )


if __name__ == "__main__":
    main()
