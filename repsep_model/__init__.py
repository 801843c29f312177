"""Semantic segmentation with vision transformers and representation separation (after arXiv 2212.13764).

The public names are imported when they are first used (PEP 562): a process that only decodes images, such as a reader
of a bulk job, never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repsep_model.checkpoint import load_segmentor, save_segmentor
    from repsep_model.config import SegmentorConfig
    from repsep_model.corruptions import corrupt
    from repsep_model.diagnostics import separation_report
    from repsep_model.export import ExportError, ExportReport, export_onnx, export_program
    from repsep_model.finetune import FineTuneReport, init_from
    from repsep_model.inference import Segmentation, segment_image
    from repsep_model.losses import LossWeights, segmentation_loss
    from repsep_model.metrics import ConfusionMatrix
    from repsep_model.pretrained import CheckpointError, LoadReport, load_pretrained
    from repsep_model.segmentor import Segmentor, SegmentorOutput, build_segmentor

__all__ = [
    "CheckpointError",
    "ConfusionMatrix",
    "ExportError",
    "ExportReport",
    "FineTuneReport",
    "LoadReport",
    "LossWeights",
    "Segmentation",
    "Segmentor",
    "SegmentorConfig",
    "SegmentorOutput",
    "build_segmentor",
    "corrupt",
    "export_onnx",
    "export_program",
    "init_from",
    "load_pretrained",
    "load_segmentor",
    "save_segmentor",
    "segment_image",
    "segmentation_loss",
    "separation_report",
]

# The imports above once more, for the interpreter; a test holds the two together.
_HOME = {
    "CheckpointError": "pretrained",
    "ConfusionMatrix": "metrics",
    "ExportError": "export",
    "ExportReport": "export",
    "FineTuneReport": "finetune",
    "LoadReport": "pretrained",
    "LossWeights": "losses",
    "Segmentation": "inference",
    "Segmentor": "segmentor",
    "SegmentorConfig": "config",
    "SegmentorOutput": "segmentor",
    "build_segmentor": "segmentor",
    "corrupt": "corruptions",
    "export_onnx": "export",
    "export_program": "export",
    "init_from": "finetune",
    "load_pretrained": "pretrained",
    "load_segmentor": "checkpoint",
    "save_segmentor": "checkpoint",
    "segment_image": "inference",
    "segmentation_loss": "losses",
    "separation_report": "diagnostics",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found  # the next use asks the module's dict alone
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
