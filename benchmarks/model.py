"""Does the model library keep its word? Runs what it claims and prints one table.

    python benchmarks/model.py [--out folder] [--pixels 12000]      (make prove-model)

Families x sizes (the matrix test), size and cost of our parts, exported models against the eager one, the contact sheet
of the corruptions and the peak memory of a large image. Exit code 1 if a line fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from repsep_model import SegmentorConfig, build_segmentor, segment_image
from repsep_model.export import export_onnx, export_program

ROOT = Path(__file__).parents[1]
CLASSES = 150
SIDE = 512
BASELINE: dict[str, Any] = {"local_pathway": False, "separation": "none", "cross_attention": 0}
EXPORTED = {"ViT-Ti/16": "vit_tiny_patch16_224", "PVTv2-B0": "pvt_v2_b0", "Swin-T": "swin_tiny_patch4_window7_224"}


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    goal: str
    found: str
    kept: bool


def matrix() -> Iterator[Line]:
    """The matrix test, in a process of its own."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/model/test_families.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    counts = ", ".join(re.findall(r"\d+ (?:passed|failed|error)", run.stdout)) or run.stdout[-200:]
    yield Line("backbone families x sizes x modes", "all pass", f"{counts} in {seconds:.0f} s", run.returncode == 0)


def parameters() -> Iterator[Line]:
    with torch.device("meta"):
        model = build_segmentor(SegmentorConfig(backbone="vit_large_patch16_224", num_classes=CLASSES))
    added = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone."))
    yield Line("parameters added to ViT-L", "< 25 M", f"{added / 1e6:.2f} M", added < 25e6)


def cost() -> Iterator[Line]:
    """FLOPs of one 512 x 512 image with 150 classes; a multiplication and an addition are two."""
    baseline = _gigaflops("vit_base_patch16_224", **BASELINE)
    full = _gigaflops("vit_base_patch16_224")
    yield Line(
        "GFLOP on ViT-B over backbone + linear head",
        "<= 1.25 x",
        f"{full:.1f} / {baseline:.1f} = {full / baseline:.2f}",
        full <= 1.25 * baseline,
    )
    for name, backbone, peer in (("Swin-T", "swin_tiny_patch4_window7_224", 62.4), ("PVTv2-B0", "pvt_v2_b0", 18.0)):
        found = _gigaflops(backbone)
        yield Line(f"GFLOP on {name}", f"< {peer} (SegFormer head)", f"{found:.1f}", found < peer)


def _gigaflops(backbone: str, **switches: Any) -> float:
    model = build_segmentor(SegmentorConfig(backbone=backbone, num_classes=CLASSES, **switches)).for_inference()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.forward_stride(torch.zeros(1, 3, SIDE, SIDE))
    return counter.get_total_flops() / 1e9


def inference_copy() -> Iterator[Line]:
    model = build_segmentor(SegmentorConfig(backbone="vit_tiny_patch16_224", num_classes=CLASSES)).eval()
    images = torch.randint(0, 256, (2, 3, 224, 311), dtype=torch.uint8)
    with torch.no_grad():
        same = torch.equal(model(images).logits, model.for_inference()(images).logits)
    yield Line("logits of for_inference()", "same to the bit", "same" if same else "they differ", same)


def compiled() -> Iterator[Line]:
    """Graph breaks of the whole model, counted by torch.compile's front end; no compiler is needed for that."""
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    for name, backbone in EXPORTED.items():
        model = build_segmentor(SegmentorConfig(backbone=backbone, num_classes=CLASSES, drop_path=0.0))
        breaks = []
        for training in (True, False):
            torch.compiler.reset()
            breaks.append(torch._dynamo.explain(model.train(training))(images).graph_break_count)
        yield Line(f"graph breaks of {name}, train and eval", "0", " and ".join(map(str, breaks)), not any(breaks))


def parity() -> Iterator[Line]:
    """Exported models of the usual size against eager, on random images."""
    with tempfile.TemporaryDirectory() as folder:
        for name, backbone in EXPORTED.items():
            torch.manual_seed(0)
            model = build_segmentor(SegmentorConfig(backbone=backbone, num_classes=CLASSES)).for_inference()
            for kind, export, suffix in (
                ("torch.export", export_program, "pt2"),
                ("ONNX", export_onnx, "onnx"),
            ):
                report = export(model, Path(folder) / f"model.{suffix}", window=256)
                found = f"{report.absolute:.1e}; relative {report.relative:.1e}"
                yield Line(f"{kind} of {name}: logits against eager", "<= 1e-4", found, report.absolute <= 1e-4)


def memory(pixels: int) -> Iterator[Line]:
    """Peak resident memory of a process that segments one square image, everything included."""
    command = [sys.executable, __file__, "--segment-one", str(pixels)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr.strip().rpartition("\n")[2] or f"exit code {run.returncode}")
    peak, seconds = map(float, run.stdout.split())
    yield Line(
        f"peak memory, {pixels} x {pixels} image, {CLASSES} classes",
        "< 3 GiB",
        f"{peak:.2f} GiB in {seconds:.0f} s",
        peak < 3,
    )


def segment_one(pixels: int) -> None:
    """Prints peak GiB and seconds."""
    model = build_segmentor(SegmentorConfig(backbone="vit_tiny_patch16_224", num_classes=CLASSES)).for_inference()
    image = np.empty((pixels, pixels, 3), np.uint8)
    rng = np.random.default_rng(0)
    for row in image:  # a whole random image at once would count in the peak
        row[:] = rng.integers(0, 256, row.shape, dtype=np.uint8)
    began = time.perf_counter()
    segment_image(model, image, dtype=torch.bfloat16)
    # Not getrusage: a process starts with the peak of the one that started it.
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 2**20
    print(peak, time.perf_counter() - began)


def sheet(out: Path) -> Iterator[Line]:
    file = out / "corruptions.png"
    command = [sys.executable, "benchmarks/corruptions.py", "--out", str(file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    yield Line("contact sheet of 16 corruptions x 5", "look at it", str(file), run.returncode == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".repsep/prove-model"))
    parser.add_argument("--pixels", type=int, default=12_000, help="side of the large image")
    parser.add_argument("--segment-one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.segment_one:
        segment_one(options.segment_one)
        return
    lines: list[Line] = []
    large = (2048, options.pixels)  # the larger goes by windows, the smaller is given to the model in one piece
    sections = [matrix(), parameters(), cost(), inference_copy(), compiled(), parity(), sheet(options.out)]
    for section in [*sections, *(memory(pixels) for pixels in large)]:
        try:
            for line in section:
                print(f"{'ok  ' if line.kept else 'FAIL'}  {line.what}: {line.found}", flush=True)
                lines.append(line)
        except Exception as error:  # the other lines are still worth having
            print(f"FAIL  {section.__name__}: {error}", flush=True)
            lines.append(Line(section.__name__, "runs", f"{type(error).__name__}: {error}", kept=False))
    width = [max(len(getattr(line, name)) for line in lines) for name in ("what", "goal", "found")]
    print(f"\n| {'claim':{width[0]}} | {'goal':{width[1]}} | {'found':{width[2]}} | kept |")
    print(f"|{'-' * (width[0] + 2)}|{'-' * (width[1] + 2)}|{'-' * (width[2] + 2)}|------|")
    for line in lines:
        kept = "yes" if line.kept else "NO"
        print(f"| {line.what:{width[0]}} | {line.goal:{width[1]}} | {line.found:{width[2]}} | {kept:4} |")
    sys.exit(not all(line.kept for line in lines))


if __name__ == "__main__":
    main()
