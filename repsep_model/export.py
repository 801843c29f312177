"""A segmentor as one file for other runtimes: torch.export (`.pt2`) or ONNX, compared with the eager model.

Both take `images`, uint8 (B, 3, S, S) for any B, and give `logits`, float32 (B, K, S, S): normalisation, padding and
upsampling are inside. S, the window, is fixed; larger images go by windows, as `segment_image` does it.
Shapes: B batch, K classes, S pixels of the window's side.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repsep_model.inference import window_side
from repsep_model.segmentor import Segmentor

TOLERANCE = 1e-4
TRACED_BATCH = 2
CHECKED_BATCHES = (1, 3)
"""Batches of other sizes than the traced one: that it stayed free is seen, not believed."""

ONE_FILE_BYTES = 1536 * 1024 * 1024
"""ONNX files end at 2 GiB; over this the weights lie beside the model, in `<file>.data`."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class ExportError(RuntimeError):
    """Nothing was written; the message says why."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and the largest differences from the eager logits on random images.

    `absolute` is in units of a logit; `relative` is to the eager logit, or to 1 where that is smaller.
    """

    file: Path
    window: int
    batches: tuple[int, ...]
    absolute: float
    relative: float


class Logits(nn.Module):
    """The model as a function from images to logits, which is what a file can hold."""

    def __init__(self, model: Segmentor) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        logits: Tensor = output.logits
        return logits


def export_program(
    model: Segmentor,
    file: str | Path,
    *,
    window: int | None = None,
    classes: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Write a `.pt2` file; `torch.export.load(file).module()(images)` gives the logits.

    `window` is S, by default the side of the sliding window; `classes` is the content of the dataset's classes.json.
    Config, mean, std, stride, window and classes travel inside as extra files. What `file` held is replaced once the
    new one agrees with the eager model. Raises ExportError where its relative difference is over `tolerance`.
    """
    file = Path(file)
    if file.suffix != ".pt2":
        raise ValueError(f"torch.export reads files that end in .pt2, got {file}")
    model, side = _ready(model, window)
    extra = _metadata(model, side, classes)
    with _replaced_at_the_end(file) as draft:
        torch.export.save(_traced(model, side), draft, extra_files=extra)
        with _quietly():
            run = torch.export.load(draft).module()
        return _compared(model, run, file, side, tolerance)


def export_onnx(
    model: Segmentor,
    file: str | Path,
    *,
    window: int | None = None,
    classes: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Write an ONNX file and run it with onnxruntime on the CPU, to compare.

    Arguments and errors are those of `export_program`; the metadata are the ONNX model's own. Weights over 1.5 GiB lie
    beside the file in `<file>.data`, which belongs to it. Needs `pip install 'repsep[export]'`.
    """
    if missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise ExportError(f"for ONNX {', '.join(missing)} must be installed: pip install 'repsep[export]'")
    import onnxruntime

    file = Path(file)
    model, side = _ready(model, window)
    metadata = _metadata(model, side, classes)
    with _replaced_at_the_end(file) as draft:
        with _quietly():
            program = torch.onnx.export(
                _traced(model, side),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes={"images": {0: "batch"}},
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        program.model.metadata_props.update(metadata)
        weights = sum(t.nbytes for t in model.state_dict().values())
        program.save(draft, external_data=weights > ONE_FILE_BYTES)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(draft, options, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

        return _compared(model, run, file, side, tolerance)


def _ready(model: Segmentor, window: int | None) -> tuple[Segmentor, int]:
    """The model that is exported, and S."""
    side = window_side(model) if window is None else window
    if side < 1:
        raise ValueError(f"the window is a side in pixels, at least 1, got {side}")
    return model.for_inference().cpu(), side


def _metadata(model: Segmentor, side: int, classes: Mapping[str, Any] | None) -> dict[str, str]:
    """JSON texts of what a reader of the file may need; mean and std are for information, the graph applies them."""
    config = model.config
    values = {
        "config": config.to_dict(),
        "window": side,
        "stride": config.stride,
        "mean": config.mean,
        "std": config.std,
    }
    if classes is not None:
        if len(classes["classes"]) != config.num_classes:
            raise ValueError(f"{len(classes['classes'])} classes given for a model of {config.num_classes}")
        values["classes"] = classes
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


def _traced(model: Segmentor, side: int) -> torch.export.ExportedProgram:
    images = torch.zeros(TRACED_BATCH, 3, side, side, dtype=torch.uint8)
    free = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(Logits(model), (images,), dynamic_shapes=free, strict=False)
    # They name this machine's folders, and are a third of a small model's file.
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


@torch.no_grad()
def _compared(
    model: Segmentor, exported: Callable[[Tensor], Tensor], file: Path, side: int, tolerance: float
) -> ExportReport:
    generator = torch.Generator().manual_seed(0)
    largest = torch.zeros(2)
    for batch in CHECKED_BATCHES:
        images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)
        eager = model(images).logits
        difference = (exported(images) - eager).abs()
        relative = difference / eager.abs().clamp_min(1)
        largest = largest.maximum(torch.stack([difference.max(), relative.max()]))  # keeps NaN, as max() does not
    report = ExportReport(file, side, CHECKED_BATCHES, *largest.tolist())
    if not report.relative <= tolerance:
        raise ExportError(
            f"{file} is not written: its logits differ from the eager model's by {report.relative:.1e} relative, "
            f"{report.absolute:.1e} absolute, and {tolerance:g} is allowed"
        )
    return report


@contextlib.contextmanager
def _replaced_at_the_end(file: Path) -> Iterator[Path]:
    """A path to write to; what is there takes the place of `file` when all went well, and nothing does otherwise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as folder:
        yield Path(folder) / file.name  # of the same name: a model knows the file of its weights by it
        parts = sorted(Path(folder).iterdir(), reverse=True)
        if len(parts) > 1:
            file.unlink(missing_ok=True)  # an old model never stands beside new weights
        for part in parts:
            part.replace(file.with_name(part.name))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporters say about their own inside: nothing that whoever exports could act on."""
    logger = logging.getLogger("onnxscript.optimizer")  # warns of each node that it does not fold
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for said in (r"`isinstance\(treespec, LeafSpec\)` is deprecated", "The given buffer is not writable"):
                warnings.filterwarnings("ignore", message=said)  # torch 2.11 of itself
            yield
    finally:
        logger.setLevel(level)
