"""What two ranks write is what they, or another number of ranks, read: to the bit, and training goes on from it so."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipelines.training.parallel import DataParallel, FullySharded, Group, Strategy
from repsep_model.losses import LossWeights
from repsep_model.optim import parameter_groups
from repsep_model.training import Batch, StepSettings, TrainState, train_step
from tests.model.tiny import random_images, random_labels, tiny_segmentor

SIDE, STEPS, SAVED = 40, 6, 3
SETTINGS = StepSettings(LossWeights(), total_steps=STEPS, warmup_steps=1, clip=0.5, bf16=False, seed=7)
KINDS: dict[str, type] = {"ddp": DataParallel, "fsdp": FullySharded}


def fresh(strategy: Strategy) -> TrainState:
    raw = tiny_segmentor(drop_path=0.1).train()
    model, ema = strategy.spread(raw, 0.9, compiled=False)
    groups = parameter_groups(raw, lr=1e-3, weight_decay=0.05, layer_decay=0.9, head_lr_scale=1.0)
    return TrainState(raw, model, torch.optim.AdamW(groups, lr=1e-3), ema)


def train(state: TrainState, group: Group, until: int) -> None:
    while state.step < until:
        images, labels = (make(4, SIDE, SIDE, seed=state.step) for make in (random_images, random_labels))
        mine: list[Batch] = [(images[group.rank :: group.world_size], labels[group.rank :: group.world_size])]
        train_step(state, mine, SETTINGS, rank=group.rank, world_size=group.world_size, all_reduce=group.all_reduce)


def whole(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in state.items()}


def everything(state: TrainState, strategy: Strategy) -> dict[str, Any]:
    return {
        "weights": whole(state.raw),
        "average": whole(state.ema.model),
        "average, gathered": whole(strategy.whole_average(state)),
    }


def saved_in(folder: Path, kind: str) -> Path:
    return folder / f"{kind}-saved"


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module|Grad strides")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group, found = Group(rank, 2), {}
    for kind, strategy_of in KINDS.items():
        strategy = strategy_of(group)
        state = fresh(strategy)
        train(state, group, SAVED)
        mine = Path(folder) / f"{kind}-{rank}"  # its own disk, as on another machine
        mine.mkdir()
        if rank < strategy.writers:
            strategy.write(state, mine)
        found[kind, "at the checkpoint"] = everything(state, strategy)
        group.barrier()
        if rank == 0:  # what the storage does with the files of all ranks
            for each in range(strategy.writers):
                shutil.copytree(Path(folder) / f"{kind}-{each}", saved_in(Path(folder), kind), dirs_exist_ok=True)
        group.barrier()
        train(state, group, STEPS)
        found[kind, "undisturbed"] = everything(state, strategy)
        again = strategy_of(group)
        resumed = fresh(again)
        again.read(resumed, saved_in(Path(folder), kind))
        resumed.step = SAVED
        train(resumed, group, STEPS)
        found[kind, "resumed"] = everything(resumed, again)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(str(folder),), nprocs=2)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[tuple[str, str], Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_that_resume_end_with_the_same_weights_to_the_bit(
    kind: str, ranks: list[dict[tuple[str, str], Any]]
) -> None:
    for found in ranks:
        for what in ("weights", "average"):
            assert same(found[kind, "resumed"][what], found[kind, "undisturbed"][what])
    assert not same(ranks[0][kind, "undisturbed"]["weights"], ranks[0][kind, "at the checkpoint"]["weights"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_can_have_the_whole_average(kind: str, ranks: list[dict[tuple[str, str], Any]]) -> None:
    for found in ranks:
        assert same(found[kind, "undisturbed"]["average, gathered"], found[kind, "undisturbed"]["average"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_reads_what_two_wrote(kind: str, folder: Path, ranks: list[dict[tuple[str, str], Any]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/alone-{kind}", rank=0, world_size=1)
    try:
        strategy = KINDS[kind](Group())
        state = fresh(strategy)
        strategy.read(state, saved_in(folder, kind))
        found = everything(state, strategy)
    finally:
        dist.destroy_process_group()
    for what, expected in ranks[0][kind, "at the checkpoint"].items():
        assert same(found[what], expected)
