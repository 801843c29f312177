"""Two processes over gloo, data parallel or sharded: 20 steps are those of one process with the global batch.

Within float tolerance, not to the bit: sums of gradients over images are taken in another order. A relative error of
1e-7 in a gradient grows over the steps; what is allowed is 1e-4 of the loss, and 1e-4 of each weight's norm.
"""

import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from repsep_model import LossWeights, Segmentor
from repsep_model.optim import Ema, parameter_groups
from repsep_model.training import Batch, NonFiniteLossError, StepSettings, TrainState, train_step
from tests.model.tiny import random_images, random_labels, tiny_segmentor

S = 40
STEPS = 20
IMAGES = 5
SHARES = (3, 2)
SETTINGS = StepSettings(weights=LossWeights(), total_steps=STEPS, warmup_steps=2, clip=0.5, bf16=False, seed=7)


@dataclass(frozen=True)
class Run:
    """How the 5 images of a step are worked on; `micro_batch` is the most that go through the model at once."""

    sharded: bool
    micro_batch: int
    grad_checkpointing: bool = False
    compiled: bool = False


RUNS = {
    "DDP": Run(False, 5),
    "DDP, micro-batches of 1": Run(False, 1),
    "DDP, micro-batches of 2, gradient checkpointing, compiled": Run(False, 2, True, True),
    "FSDP2": Run(True, 5),
    "FSDP2, micro-batches of 1": Run(True, 1),
    "FSDP2, micro-batches of 2, gradient checkpointing": Run(True, 2, True),
}


def global_batch(step: int) -> Batch:
    images, labels = random_images(IMAGES, S, S, seed=step), random_labels(IMAGES, S, S, seed=step)
    labels[1, 4:] = 255  # ranks and images count differently
    return images, labels


def share(step: int, rank: int, micro_batch: int) -> list[Batch]:
    images, labels = (part.split(SHARES)[rank] for part in global_batch(step))
    return list(zip(images.split(micro_batch), labels.split(micro_batch), strict=True))


def shard(model: Segmentor) -> Segmentor:
    assert model.local_pathway is not None
    for part in (*model.backbone.model.blocks, *model.local_pathway.blocks, model.cross_attention):
        fully_shard(part)
    fully_shard(model)
    return model


def fresh_state(run: Run | None = None) -> TrainState:
    raw = tiny_segmentor(drop_path=0.0)
    wrapped: nn.Module = raw
    ema = Ema(raw, 0.9)
    if run is not None:
        raw.set_grad_checkpointing(run.grad_checkpointing)
        if run.compiled:
            raw.compile(backend="aot_eager")
        if run.sharded:
            ema = Ema.of(shard(tiny_segmentor(drop_path=0.0)), 0.9)
            shard(raw)
        else:
            wrapped = DistributedDataParallel(raw)
    groups = parameter_groups(raw, lr=1e-3, weight_decay=0.05, layer_decay=0.9, head_lr_scale=1.0)
    # The gradient of an attention key's bias is 0 but for rounding; a small eps would make a full step of it.
    return TrainState(raw.train(), wrapped.train(), torch.optim.AdamW(groups, lr=1e-3, eps=1e-4), ema)


def full(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in state.items()}


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(minutes=3))
    how: dict[str, Any] = {"rank": rank, "world_size": 2, "all_reduce": dist.all_reduce}
    found: dict[str, Any] = {}
    for name, run in RUNS.items():
        state = fresh_state(run)
        reports = [train_step(state, share(i, rank, run.micro_batch), SETTINGS, **how) for i in range(STEPS)]
        found[name] = {"reports": reports, "weights": full(state.raw), "average": full(state.ema.model)}
        if run.sharded:
            parts = [p for p in state.raw.parameters() if isinstance(p, DTensor)]
            found[name]["held"] = sum(p.to_local().numel() for p in parts) / sum(p.numel() for p in parts)
            poisoned = [(images.float() * (float("nan") if rank else 1), y) for images, y in share(0, rank, 2)]
            try:
                train_step(state, poisoned, SETTINGS, **how)
            except NonFiniteLossError as error:
                found[name]["stopped"] = error.step
            found[name]["after"] = full(state.raw)
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(str(folder),), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    state = fresh_state()
    reports = [train_step(state, [global_batch(i)], SETTINGS) for i in range(STEPS)]
    return {"reports": reports, "weights": full(state.raw), "average": full(state.ema.model)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    off = {name: float((found[name] - t).norm() / t.norm()) for name, t in expected.items()}
    assert max(off.values()) < 1e-4, max(off.items(), key=lambda item: item[1])


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_give_one_processes_losses_weights_and_average(
    ranks: list[dict[str, Any]], one_process: dict[str, Any], name: str
) -> None:
    for found in (rank[name] for rank in ranks):
        for report, expected in zip(found["reports"], one_process["reports"], strict=True):
            assert report == pytest.approx(expected, rel=1e-4)
        assert_close(found["weights"], one_process["weights"])
        assert_close(found["average"], one_process["average"])


@pytest.mark.parametrize("name", RUNS)
def test_ranks_end_with_the_same_bits(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["reports"] == second["reports"]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.sharded])
def test_sharded_rank_holds_half_and_stops_with_all_at_a_loss_that_is_not_finite(
    ranks: list[dict[str, Any]], name: str
) -> None:
    for found in (rank[name] for rank in ranks):
        assert found["held"] == pytest.approx(0.5, abs=0.05)
        assert found["stopped"] == STEPS
        torch.testing.assert_close(found["after"], found["weights"], rtol=0, atol=0)


def test_tolerance_is_far_below_what_another_gradient_does(one_process: dict[str, Any]) -> None:
    """The same 20 steps with one image less in each."""
    state = fresh_state()
    reports = [
        train_step(state, [(images[1:], labels[1:])], SETTINGS)
        for images, labels in (global_batch(i) for i in range(STEPS))
    ]
    assert reports[-1]["loss"] != pytest.approx(one_process["reports"][-1]["loss"], rel=1e-3)
