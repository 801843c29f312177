"""What does a training step cost, and what of it is ours? Prints one table against backbone + linear head.

    python benchmarks/step.py [--backbone vit_tiny_patch16_224] [--side 512] [--batch 2] [--compile]

On the GPU where there is one. Each line is a process of its own: memory is its peak (allocated on a GPU, resident
beyond what the libraries take on a CPU), with weights, optimizer state and moving average. Of the ceiling: FLOPs of the
model's forward and backward pass, recomputed ones not counted, by those of large matrix products in the line's type.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repsep_model import LossWeights, SegmentorConfig, build_segmentor
from repsep_model.optim import Ema, parameter_groups
from repsep_model.training import StepSettings, TrainState, train_step

BASELINE: dict[str, Any] = {"local_pathway": False, "separation": "none", "cross_attention": 0}
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "backbone + linear head": (BASELINE, False),
    "full": ({}, False),
    "full, gradient checkpointing": ({}, True),
}


@dataclass(frozen=True)
class Cost:
    """Of one step."""

    seconds: float
    gib: float
    flops: float
    ceiling: float
    """FLOPs of a large matrix product in one second."""


def measure(name: str, bf16: bool, options: argparse.Namespace) -> Cost:
    switches, grad_checkpointing = MODELS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = SegmentorConfig(backbone=options.backbone, num_classes=options.classes, **switches)
    before = 0 if device.type == "cuda" else _resident("VmRSS")
    model = build_segmentor(config).to(device).train()
    if grad_checkpointing:
        model.set_grad_checkpointing()
    if options.compile:
        model.compile()
    groups = parameter_groups(model, lr=1e-5, weight_decay=0.05, layer_decay=0.9, head_lr_scale=1.0)
    state = TrainState(model, model, torch.optim.AdamW(groups, lr=1e-5), Ema(model, 0.999))
    settings = StepSettings(LossWeights(), total_steps=100, warmup_steps=0, clip=1.0, bf16=bf16, seed=0)
    images = torch.randint(0, 256, (options.batch, 3, options.side, options.side), dtype=torch.uint8)
    patches = torch.randint(0, options.classes, (options.batch, 8, 8)).to(torch.uint8)
    labels = patches.repeat_interleave(options.side // 8, dim=1).repeat_interleave(options.side // 8, dim=2)
    batch = (images[..., : labels.shape[1], : labels.shape[2]].to(device), labels.to(device))
    seconds = []
    for _ in range(2 + options.steps):
        began = time.perf_counter()
        train_step(state, [batch], settings)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM") - before
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Cost(
        statistics.median(seconds[2:]),
        peak / 2**30,
        _flops(config, options.batch, options.side),
        _ceiling(device, dtype),
    )


def _flops(config: SegmentorConfig, batch: int, side: int) -> float:
    """Forward and backward of the model, counted without computing anything."""
    model, fake = build_segmentor(config).train(), FakeTensorMode()
    tensors: dict[str, Any] = {
        name: fake.from_tensor(t) for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    # The other kernels of attention differ by device, and not all are counted.
    with fake, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = torch.func.functional_call(model, tensors, torch.zeros(batch, 3, side, side))
        parts = [output.logits, *(p for p in vars(output.aux).values() if isinstance(p, torch.Tensor))]
        torch.stack([part.sum() for part in parts]).sum().backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops())


def _ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of square matrix products: the best of five."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):  # the first is a warm-up that seldom wins
        began = time.perf_counter()
        a @ b
        _wait(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--side", type=int, default=512, help="pixels of a crop")
    parser.add_argument("--batch", type=int, default=2, help="images in a step")
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, after two that are not")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    how = ", compiled" if options.compile else ""
    size = f"{options.batch} x {options.side} x {options.side}, {options.classes} classes"
    print(f"{options.backbone}, {size}{how}; {where}\n")
    print("| model | type | ms a step | over baseline | GiB | over baseline | TFLOP | of the ceiling |")
    print("|---|---|---|---|---|---|---|---|")
    for bf16 in (False, True):
        baseline: Cost | None = None
        for name in MODELS:
            # A new process each time: what was freed before would hide in the peak.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                cost = pool.submit(measure, name, bf16, options).result()
            baseline = baseline or cost
            print(
                f"| {name} | {'bf16' if bf16 else 'fp32'} | {1000 * cost.seconds:.0f} | "
                f"{cost.seconds / baseline.seconds:.2f} x | {cost.gib:.2f} | {cost.gib / baseline.gib:.2f} x | "
                f"{cost.flops / 1e12:.3f} | {cost.flops / cost.seconds / cost.ceiling:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
