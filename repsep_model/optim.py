"""Parameter groups with layer decay, the learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from torch import Tensor, nn

from repsep_model.segmentor import Segmentor


def parameter_groups(
    model: Segmentor, *, lr: float, weight_decay: float, layer_decay: float, head_lr_scale: float
) -> list[dict[str, Any]]:
    """Optimizer groups: the backbone's by timm's layers (deeper ones learn faster), our parts at lr * head_lr_scale.

    Vectors and scalars (norms, biases, layer scales) have no weight decay, nor has what timm names for the backbone
    (class token, positions). Each group keeps its `base_lr`.
    """
    backbone = model.backbone.model
    undecayed = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    by_layer = param_groups_layer_decay(
        backbone, weight_decay=weight_decay, no_weight_decay_list=undecayed, layer_decay=layer_decay
    )
    groups = [
        {"params": g["params"], "weight_decay": g["weight_decay"], "base_lr": lr * g["lr_scale"]} for g in by_layer
    ]
    ours = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    for decay, members in (
        (weight_decay, [p for p in ours if not _is_vector(p)]),
        (0.0, [p for p in ours if _is_vector(p)]),
    ):
        groups.append({"params": members, "weight_decay": decay, "base_lr": lr * head_lr_scale})
    return groups


def _is_vector(parameter: Tensor) -> bool:
    """One value per channel, also where it is shaped (D, 1, 1) to fit a map, or a scalar."""
    return parameter.ndim <= 1 or parameter.numel() == parameter.shape[0]


def scheduled_lr(step: int, *, total_steps: int, warmup_steps: int, power: float = 0.9) -> float:
    """Factor on the base rate at `step` (from 0): linear warm-up, then polynomial decay towards 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return float((1 - min(progress, 1.0)) ** power)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate becomes its `base_lr` times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


class Ema:
    """Exponential moving average of a model's weights, in fp32.

    The decay ramps up with the step, min(decay, (1 + step) / (10 + step)), so that a short run is not an average over
    its random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @classmethod
    def of(cls, average: nn.Module, decay: float) -> Ema:
        """Takes a copy that the caller made: a sharded model cannot be copied, but a second one sharded alike."""
        ema = cls.__new__(cls)
        ema.decay, ema.model = decay, average.eval().requires_grad_(False)
        return ema

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        # One call: hundreds of small ones would leave a GPU waiting.
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for buffer, latest in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(latest)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state)
