"""How ranks work together: the group, and the two ways to spread a model over it.

    DataParallel   DDP: every rank holds all of model, average and optimizer; rank 0 writes them
    FullySharded   FSDP2: every rank holds, and writes, a share of each

A strategy wraps the model, gives the average as a whole where it is needed as one, and writes and reads a checkpoint's
tensors. Nothing here knows of Ray.
"""

from __future__ import annotations

import contextlib
import copy
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from repsep_model.optim import Ema
from repsep_model.segmentor import Segmentor
from repsep_model.training import TrainState

STATE = "state.pt"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Group:
    """The ranks that train together; one alone needs no process group. All of them call each method."""

    rank: int = 0
    world_size: int = 1
    node_rank: int = 0
    local_rank: int = 0
    device: torch.device = CPU

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def worst(self, value: float) -> float:
        """The largest of the ranks' values."""
        if self.world_size == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    def share(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def spread_first(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's values into the others' tensors."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.worst(0.0)

    @contextlib.contextmanager
    def shared_folder(self) -> Iterator[Path]:
        """A temporary folder that the ranks of a machine share."""
        name = self.share(f"repsep-restore-{secrets.token_hex(8)}")
        folder = Path(tempfile.gettempdir()) / f"{name}-{self.node_rank}"
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            yield folder
        finally:
            if self.local_rank == 0:
                shutil.rmtree(folder, ignore_errors=True)


class Strategy(Protocol):
    """What a worker asks of a way to spread a model."""

    writers: int
    """How many ranks write into a checkpoint, the first ones."""

    def spread(self, raw: Segmentor, decay: float, *, compiled: bool) -> tuple[nn.Module, Ema]:
        """What is called for a forward pass, and the moving average. `raw` may be changed in place."""

    def whole_average(self, state: TrainState) -> Segmentor:
        """The average as a model that each rank can run by itself."""

    def write(self, state: TrainState, folder: Path) -> None:
        """This rank's part of the tensors. Raises OSError or RuntimeError."""

    def read(self, state: TrainState, folder: Path) -> None:
        """The reverse, from all ranks' files."""


class DataParallel:
    """DDP, or nothing at all on one worker."""

    writers = 1

    def __init__(self, group: Group) -> None:
        self.group = group

    def spread(self, raw: Segmentor, decay: float, *, compiled: bool) -> tuple[nn.Module, Ema]:
        ema = Ema(raw, decay)
        if compiled:
            raw.compile()
        if self.group.world_size == 1:
            return raw, ema
        if raw.mean.is_cuda:
            return DistributedDataParallel(raw, device_ids=[raw.mean.device]), ema
        # NOTE otherwise DDP arranges its buckets anew after a process's first step, and where a number lies in a bucket
        # decides in which order gloo adds three or more of them: after a resume the sums would round in another way.
        return DistributedDataParallel(raw, find_unused_parameters=self.group.world_size > 2), ema

    def whole_average(self, state: TrainState) -> Segmentor:
        assert isinstance(state.ema.model, Segmentor)
        return state.ema.model

    def write(self, state: TrainState, folder: Path) -> None:
        tensors = {"model": state.raw.state_dict(), "average": state.ema.state_dict()}
        torch.save(tensors | {"optimizer": state.optimizer.state_dict()}, folder / STATE)

    def read(self, state: TrainState, folder: Path) -> None:
        saved = torch.load(folder / STATE, map_location=state.raw.mean.device, weights_only=True)
        state.raw.load_state_dict(saved["model"])
        state.ema.load_state_dict(saved["average"])
        state.optimizer.load_state_dict(saved["optimizer"])


class FullySharded:
    """FSDP2: each block is a unit whose weights are gathered when it runs; what is in no block is one more unit.

    Its checkpoints (torch.distributed.checkpoint) can be read by any number of workers.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.writers = group, group.world_size
        self.whole: Segmentor | None = None

    def spread(self, raw: Segmentor, decay: float, *, compiled: bool) -> tuple[nn.Module, Ema]:
        average = copy.deepcopy(raw)
        self.whole = copy.deepcopy(raw).eval().requires_grad_(False).to("meta")
        mesh = init_device_mesh(self.group.device.type, (self.group.world_size,))
        for model in (raw, average):
            for block in _blocks(model):
                if compiled and model is raw:
                    block.compile()
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return raw, Ema.of(average, decay)

    def whole_average(self, state: TrainState) -> Segmentor:
        """Gathered on every rank, so that ranks may validate different numbers of images."""
        assert self.whole is not None
        whole = copy.deepcopy(self.whole).to_empty(device=self.group.device)
        with torch.no_grad():
            for target, share in zip(whole.parameters(), state.ema.model.parameters(), strict=True):
                assert isinstance(share, DTensor)
                target.copy_(share.full_tensor())
            for buffer, source in zip(whole.buffers(), state.ema.model.buffers(), strict=True):
                buffer.copy_(source)
        return whole

    def write(self, state: TrainState, folder: Path) -> None:
        try:
            save(_tensors(state), checkpoint_id=folder)
        except CheckpointException as error:  # a BaseException; every rank gets it where one cannot write
            raise OSError(str(error)) from error

    def read(self, state: TrainState, folder: Path) -> None:
        tensors = _tensors(state)
        load(tensors, checkpoint_id=folder)
        set_state_dict(
            state.raw,
            state.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer's blocks, which every timm family calls so, and those of our local pathway."""
    return [
        block
        for name, part in model.named_modules()
        if name.rpartition(".")[2] == "blocks"
        for block in part.children()
    ]


def _tensors(state: TrainState) -> dict[str, Any]:
    """All shares under names that do not depend on the number of ranks; the average's are the live ones."""
    model, optimizer = get_state_dict(state.raw, state.optimizer)
    return {"model": model, "average": get_model_state_dict(state.ema.model), "optimizer": optimizer}
