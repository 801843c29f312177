"""Semantic segmentation with vision transformers and representation separation (after arXiv 2212.13764)."""

from repsep_model.checkpoint import load_segmentor, save_segmentor
from repsep_model.config import SegmentorConfig
from repsep_model.corruptions import corrupt
from repsep_model.diagnostics import separation_report
from repsep_model.export import ExportError, ExportReport, export_onnx, export_program
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
    "load_pretrained",
    "load_segmentor",
    "save_segmentor",
    "segment_image",
    "segmentation_loss",
    "separation_report",
]
