"""Conventions of label maps, each defined once: the ignore index, which ids there are, the reduction to stride s.

Shapes: B batch, K classes, H x W pixels, h x w grid at stride s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255
"""Pixels that are not labelled; never trained on, never counted."""

MAX_CLASSES = 255
"""Train ids are 0..254 in 8-bit masks; 255 is the ignore index."""


def check_ids(labels: Tensor, num_classes: int) -> None:
    """Raises ValueError for an id that is neither 0..K-1 nor IGNORE_INDEX; labels on an accelerator are not looked at.

    Whether an id is wrong decides what happens next: an accelerator would have to be waited for in every step, and
    torch.compile would need a second graph.
    """
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (labels < 0) | ((labels >= num_classes) & (labels != IGNORE_INDEX))
    if wrong.any():
        raise ValueError(
            f"labels hold the id {labels[wrong][0].item()}: class ids must be 0..{num_classes - 1}, "
            f"{IGNORE_INDEX} where nothing is labelled"
        )


def class_counts(labels_BHW: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class in each image, (B, K) int64; ignored pixels are not counted."""
    flat = labels_BHW.flatten(1).long()
    valid = flat != IGNORE_INDEX
    counts = torch.zeros(flat.shape[0], num_classes, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(1, flat.where(valid, 0), valid.long())


def majority_reduce(labels_BHW: Tensor, stride: int, num_classes: int) -> Tensor:
    """The commonest labelled class of each stride x stride block, (B, ceil(H/s), ceil(W/s)) int64.

    A block whose two commonest classes tie, or that has no labelled pixel, is ignored. Blocks that stick out of the
    image are judged by the pixels inside. Memory grows with K * h * w, not with K * H * W.
    """
    B, H, W = labels_BHW.shape
    padded = F.pad(labels_BHW.long(), (0, -W % stride, 0, -H % stride), value=IGNORE_INDEX)
    h, w = padded.shape[1] // stride, padded.shape[2] // stride
    blocks = padded.reshape(B, h, stride, w, stride).permute(0, 1, 3, 2, 4).reshape(B * h * w, stride * stride)
    counts = class_counts(blocks, num_classes)
    if num_classes == 1:
        reduced = torch.where(counts[:, 0] > 0, 0, IGNORE_INDEX)
    else:
        best, classes = counts.topk(2, dim=1)
        reduced = torch.where(best[:, 0] > best[:, 1], classes[:, 0], IGNORE_INDEX)
    return reduced.reshape(B, h, w)
