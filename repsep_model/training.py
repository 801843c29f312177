"""One training step and one validation pass, free of any launcher: what distributes passes its all-reduce in.

count the labels of all micro-batches -> all-reduce one vector -> forward and backward each -> clip -> step -> EMA
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repsep_model.images import UInt8
from repsep_model.inference import segment_image
from repsep_model.losses import MAIN_TERMS, LossWeights, segmentation_loss, term_weights, total_loss
from repsep_model.metrics import ConfusionMatrix
from repsep_model.optim import Ema, scheduled_lr, set_lr
from repsep_model.segmentor import Segmentor, SegmentorOutput

AllReduce = Callable[[Tensor], object]
"""Sums a tensor over all ranks, in place."""

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, S, S) uint8 and labels (B, S, S) uint8."""


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite: training must stop before the weights are lost."""


@dataclass(frozen=True)
class StepSettings:
    """What does not change from step to step."""

    weights: LossWeights
    total_steps: int
    warmup_steps: int
    clip: float
    bf16: bool
    seed: int


@dataclass
class TrainState:
    """What a step changes, and all that a checkpoint must hold. `model` may be wrapped in DDP; `raw` never is."""

    raw: Segmentor
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    step: int = 0


def train_step(
    state: TrainState,
    batches: Sequence[Batch],
    settings: StepSettings,
    *,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: AllReduce | None = None,
) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches; returns mean losses over all ranks, gradient norm and rate.

    The losses are those of the terms that the model gives: an active one that needs a part it lacks is left out.
    The step's gradient is that of one process with the global batch, whatever the split: weights are counted first.
    Raises NonFiniteLossError before anything is updated.
    """
    raw, weights = state.raw, settings.weights
    device = raw.mean.device
    names = list(weights.active())
    totals = torch.zeros(len(names), dtype=torch.float64, device=device)
    for _, labels in batches:
        found = term_weights(
            labels.to(device), num_classes=raw.config.num_classes, stride=raw.config.stride, weights=weights
        )
        totals += torch.stack([found[name] for name in names])
    if all_reduce is not None:
        all_reduce(totals)
    by_name = dict(zip(names, totals, strict=True))

    # Drop path is the only randomness here; seeded from the counters, a resumed run draws the same numbers.
    torch.manual_seed((settings.seed * 1_000_003 + state.step) * 1_009 + rank)
    set_lr(
        state.optimizer, scheduled_lr(state.step, total_steps=settings.total_steps, warmup_steps=settings.warmup_steps)
    )
    state.optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    given: set[str] = set()  # the same on every rank, for the model decides
    for number, (images, labels) in enumerate(batches):
        last = number == len(batches) - 1
        no_sync = getattr(state.model, "no_sync", None)
        with no_sync() if no_sync is not None and not last else contextlib.nullcontext():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.bf16):
                output = state.model(images.to(device, non_blocking=True))
            terms = segmentation_loss(output, labels.to(device, non_blocking=True), weights)
            loss_share = total_loss(terms, weights, by_name, world_size) + _nothing(
                output, used=not weights.active().keys().isdisjoint(MAIN_TERMS)
            )
            loss_share.backward()  # type: ignore[no-untyped-call]
        given |= terms.keys()
        for i, name in enumerate(names):
            if name in terms:
                sums[i] += terms[name][0].detach().double()
    if all_reduce is not None:
        all_reduce(sums)
    means = sums / totals.clamp_min(1e-6)
    losses = {f"loss/{name}": float(value) for name, value in zip(names, means, strict=True) if name in given}
    loss = sum(weight * losses[f"loss/{name}"] for name, weight in weights.active().items() if name in given)
    norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), settings.clip)
    if not (torch.isfinite(norm) and torch.isfinite(torch.tensor(loss))):
        raise NonFiniteLossError(
            f"loss {loss} with gradient norm {float(norm)} at step {state.step}: lower the learning rate"
        )
    state.optimizer.step()
    state.ema.update(raw, state.step)
    state.step += 1
    return losses | {"loss": float(loss), "grad_norm": float(norm), "lr": state.optimizer.param_groups[-1]["lr"]}


def _nothing(output: SegmentorOutput, *, used: bool) -> Tensor:
    """0 from every output: DDP waits for each parameter's gradient, also in a head whose loss weight is 0."""
    parts = [part.sum() for part in vars(output.aux).values() if isinstance(part, Tensor)] if output.aux else []
    if not used:  # the gradient of even one pixel is K x H x W zeros
        parts.append(output.logits[..., 0, 0].sum())
    return 0.0 * sum(parts, start=output.logits.new_zeros(()))


def validate(
    model: Segmentor, samples: Iterable[tuple[UInt8, UInt8]], *, bf16: bool, all_reduce: AllReduce | None = None
) -> ConfusionMatrix:
    """Confusion of whole images (H, W, 3) with their masks (H, W). Each rank passes its own share, none twice."""
    confusion = ConfusionMatrix(model.config.num_classes, model.mean.device)
    was_training = model.training
    model.eval()
    for image, mask in samples:
        found = segment_image(model, image, dtype=torch.bfloat16 if bf16 else torch.float32)
        confusion.update(torch.from_numpy(mask), torch.from_numpy(found.labels))
    model.train(was_training)
    if all_reduce is not None:
        all_reduce(confusion.counts)
    return confusion
