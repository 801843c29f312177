"""Semantic segmentation with vision transformers and representation separation (after arXiv 2212.13764)."""

from repsep_model.checkpoint import load_segmentor, save_segmentor
from repsep_model.config import SegmentorConfig
from repsep_model.corruptions import corrupt
from repsep_model.diagnostics import separation_report
from repsep_model.inference import Segmentation, segment_image
from repsep_model.losses import LossWeights, segmentation_loss
from repsep_model.metrics import ConfusionMatrix
from repsep_model.segmentor import Segmentor, SegmentorOutput, build_segmentor

__all__ = [
    "ConfusionMatrix",
    "LossWeights",
    "Segmentation",
    "Segmentor",
    "SegmentorConfig",
    "SegmentorOutput",
    "build_segmentor",
    "corrupt",
    "load_segmentor",
    "save_segmentor",
    "segment_image",
    "segmentation_loss",
    "separation_report",
]
