"""What a model costs at 512 x 512, without training: parameters, FLOPs, latency, peak memory. Each in its own process.

    PYTHONPATH=. python -m benchmarks.evidence.cost <arm>

prints one JSON line. Latency and memory need a machine on which nothing else computes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

SIDE = 512
BATCHES = (1, 8)


def measure(arm: str, batch: int) -> dict[str, Any]:
    """In a fresh process: the peak of its memory cannot be taken back."""
    command = [sys.executable, "-m", "benchmarks.evidence.cost", arm, "--batch", str(batch)]
    env = os.environ | {"TIMM_FUSED_ATTN": "1"}  # as models are used, whatever they were trained with
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def costs(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{arm: parameters in M, GFLOPs of one image, and ms an image and peak MB at each batch size}."""
    found = {}
    for arm in arms:
        parts = {batch: measure(arm, batch) for batch in BATCHES}
        found[arm] = {"parameters_M": parts[1]["parameters_M"], "gflops": parts[1]["gflops"]}
        for batch, part in parts.items():
            found[arm] |= {f"ms_{batch}": part["ms"], f"peak_mb_{batch}": part["peak_mb"]}
    return found


def main() -> None:
    from benchmarks.evidence.arms import ALL
    from benchmarks.evidence.runs import Run, Training, build

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm")
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    arm = ALL[options.arm]
    with arm.change(), torch.inference_mode():
        model = build(Run(arm, 0, Training("camvid", "final", 1)), 11).eval().for_inference()
        images = torch.zeros(options.batch, 3, SIDE, SIDE, dtype=torch.uint8)
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with torch.autocast("cpu", torch.bfloat16):
            spent = []
            for _ in range(7 if options.batch == 1 else 4):
                began = time.perf_counter()
                model(images)
                spent.append(time.perf_counter() - began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with FlopCounterMode(display=False) as counter:
            model(images[:1])
    found = {
        "parameters_M": round(sum(p.numel() for p in model.parameters()) / 1e6, 3),
        "gflops": round(counter.get_total_flops() / 1e9, 2),
        "ms": round(1e3 * statistics.median(spent[1:]) / options.batch, 1),
        "peak_mb": round((peak - base) / 1024),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
