"""One training step and one validation pass, free of any launcher: what distributes passes its all-reduce in.

count the labels of all micro-batches -> all-reduce one vector -> forward and backward each -> clip -> step -> EMA
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from repsep_model.images import UInt8
from repsep_model.inference import segment_image
from repsep_model.labels import IGNORE_INDEX
from repsep_model.losses import MAIN_TERMS, LossWeights, segmentation_loss, term_weights, total_loss
from repsep_model.metrics import ConfusionMatrix
from repsep_model.optim import Ema, scheduled_lr, set_lr
from repsep_model.segmentor import Segmentor, SegmentorOutput

AllReduce = Callable[[Tensor], object]
"""Sums a tensor over all ranks, in place."""

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, S, S) uint8 and labels (B, S, S) uint8."""


class NonFiniteLossError(RuntimeError):
    """The loss of `step` is NaN or infinite: training must stop before the weights are lost."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


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
    """What a step changes, and all that a checkpoint must hold.

    `raw` holds the parameters that the optimizer moves, sharded ones (DTensors) after `fully_shard`; `model` is what is
    called: `raw` itself, or DDP around it.
    """

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
    Ranks may hold different numbers of images and of micro-batches, but none may hold none.
    Raises NonFiniteLossError before anything is updated.
    """
    raw, weights = state.raw, settings.weights
    device = raw.mean.device
    names = list(weights.active())
    there = [(i.to(device, non_blocking=True), labels.to(device, non_blocking=True)) for i, labels in batches]
    totals, most = _count(raw, there, weights, rank, world_size, all_reduce)
    if isinstance(raw, FSDPModule):  # the one case in which the host needs a number from the device here
        there = _filled(there, int(most))

    # Drop path is the only randomness here; seeded from the counters, a resumed run draws the same numbers.
    torch.manual_seed((settings.seed * 1_000_003 + state.step) * 1_009 + rank)
    set_lr(
        state.optimizer, scheduled_lr(state.step, total_steps=settings.total_steps, warmup_steps=settings.warmup_steps)
    )
    state.optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros_like(totals)
    given: set[str] = set()  # the same on every rank, for the model decides
    by_name = dict(zip(names, totals, strict=True))
    for number, batch in enumerate(there):
        with _exchange(state, last=number == len(there) - 1):
            loss_share, found = _losses(state.model, batch, settings, by_name, world_size)
            loss_share.backward()  # type: ignore[no-untyped-call]
        given |= found.keys()
        sums += torch.stack([found.get(name, totals.new_zeros(())).double() for name in names])
    if all_reduce is not None:
        all_reduce(sums)
    norm = _clip(raw, settings.clip)
    # One copy to the host for all that is reported: each waits for the device.
    *means, grad_norm = torch.cat([sums / totals.clamp_min(1e-6), norm.double()[None]]).tolist()
    losses = {f"loss/{name}": value for name, value in zip(names, means, strict=True) if name in given}
    loss = float(sum(weight * losses[f"loss/{name}"] for name, weight in weights.active().items() if name in given))
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteLossError(
            f"loss {loss} with gradient norm {grad_norm} at step {state.step}: lower the learning rate", state.step
        )
    state.optimizer.step()
    state.ema.update(raw, state.step)
    state.step += 1
    return losses | {"loss": loss, "grad_norm": grad_norm, "lr": state.optimizer.param_groups[-1]["lr"]}


def _count(
    raw: Segmentor,
    batches: Sequence[Batch],
    weights: LossWeights,
    rank: int,
    world_size: int,
    all_reduce: AllReduce | None,
) -> tuple[Tensor, Tensor]:
    """The step's total weight of each active term, and the most micro-batches that a rank holds: one all-reduce."""
    counts = torch.zeros(len(weights.active()) + world_size, dtype=torch.float64, device=raw.mean.device)
    for _, labels in batches:
        found = term_weights(labels, num_classes=raw.config.num_classes, stride=raw.config.stride, weights=weights)
        counts[:-world_size] += torch.stack(list(found.values()))
    counts[rank - world_size] = len(batches)
    if all_reduce is not None:
        all_reduce(counts)
    return counts[:-world_size], counts[-world_size:].max()


def _filled(batches: list[Batch], most: int) -> list[Batch]:
    """Each forward and backward of a sharded model gathers weights from all ranks, so all must make as many: a rank
    that holds fewer micro-batches makes up for them with one in which nothing is labelled, which adds exactly 0."""
    images, labels = batches[0]
    return [(images, torch.full_like(labels, IGNORE_INDEX))] * (most - len(batches)) + batches


def _exchange(state: TrainState, *, last: bool) -> contextlib.AbstractContextManager[object]:
    """Ranks exchange gradients once a step, in the backward pass of the last micro-batch."""
    if isinstance(state.raw, FSDPModule):
        state.raw.set_requires_gradient_sync(last)
    elif isinstance(state.model, DistributedDataParallel) and not last:
        return state.model.no_sync()
    return contextlib.nullcontext()


def _losses(
    model: nn.Module, batch: Batch, settings: StepSettings, totals: dict[str, Tensor], world_size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar to run backward on, and the terms' sums. The logits, the largest tensor, end here."""
    images, labels = batch
    weights = settings.weights
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=settings.bf16):
        output = model(images)
    terms = segmentation_loss(output, labels, weights)
    unused = weights.active().keys().isdisjoint(MAIN_TERMS)
    loss = total_loss(terms, weights, totals, world_size) + _nothing(output, used=not unused)
    return loss, {name: total.detach() for name, (total, _) in terms.items()}


def _clip(raw: nn.Module, most: float) -> Tensor:
    """Scale the gradients to a norm of `most` or less; returns their norm before, of all ranks' shards together."""
    norm = nn.utils.get_total_norm([p.grad for p in raw.parameters() if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(raw.parameters(), most, norm)
    return norm


def _nothing(output: SegmentorOutput, *, used: bool) -> Tensor:
    """0 from every output: DDP waits for each parameter's gradient, also in a head whose loss weight is 0."""
    parts = [part.sum() for part in vars(output.aux).values() if isinstance(part, Tensor)] if output.aux else []
    if not used:  # the gradient of even one pixel is K x H x W zeros
        parts.append(output.logits[..., 0, 0].sum())
    return 0.0 * sum(parts, start=output.logits.new_zeros(()))


def validate(
    model: Segmentor,
    samples: Iterable[tuple[UInt8, UInt8]],
    *,
    bf16: bool,
    all_reduce: AllReduce | None = None,
    keep: int = 0,
    kept: list[tuple[UInt8, UInt8, UInt8]] | None = None,
) -> ConfusionMatrix:
    """Confusion of whole images (H, W, 3) with their masks (H, W). Each rank passes its own share, none twice.

    The first `keep` images are appended to `kept`, each with its mask and with the labels that the model gives it. No
    sharded model: ranks would have to make as many forward passes, of images of as many sizes.
    """
    confusion = ConfusionMatrix(model.config.num_classes, model.mean.device)
    was_training = model.training
    model.eval()
    for number, (image, mask) in enumerate(samples):
        found = segment_image(model, image, dtype=torch.bfloat16 if bf16 else torch.float32)
        confusion.update(torch.from_numpy(mask), torch.from_numpy(found.labels))
        if kept is not None and number < keep:
            kept.append((image, mask, found.labels))
    model.train(was_training)
    if all_reduce is not None:
        all_reduce(confusion.counts)
    return confusion
