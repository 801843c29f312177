"""The Ray cluster that stages run on: the one that is there, or one of this machine's own."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray._common.utils import reset_ray_address
from ray._private.services import find_bootstrap_address

from pipelines.errors import StoppedError, UsageError
from pipelines.progress import say
from pipelines.storage import is_local

# Two processes on two cores with OpenMP's spinning threads run ten times slower than without.
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def connect(*, dashboard: bool = True) -> None:
    """Attach to $RAY_ADDRESS or a cluster started on this machine, else start one; nothing if already attached.

    `RAY_ADDRESS=local` always starts one of its own. Ray's dashboard costs it 300 MB and some CPU; sweeps need it.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # report() waits for the next check
    environment = WORKER_ENVIRONMENT | {k: v for k, v in os.environ.items() if k.startswith("RAY_TRAIN_")}
    try:
        ray.init(
            address="local" if noted_cluster_is_gone() else None,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": environment},
            include_dashboard=None if dashboard else False,  # without a word to a cluster that is there
        )
    except ConnectionError as error:
        raise UsageError(f"no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}") from error
    resources = ray.cluster_resources()
    say(f"Ray: {len(nodes())} node(s), {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs")


def noted_cluster_is_gone() -> bool:
    """Whether Ray would look for minutes, and in vain, for a cluster that was killed on this machine.

    `ray start` notes the address in a file that only `ray stop` removes. Such a note is removed here: Ray Train's
    actors look for their own cluster by it.
    """
    if os.environ.get("RAY_ADDRESS") or (address := find_bootstrap_address(None)) is None:
        return False
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        say(f"Ray: the cluster noted at {address} does not answer, one of this machine's own is started")
        reset_ray_address()
        return True
    return False


def nodes() -> list[dict[str, Any]]:
    """The nodes that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def has_gpu() -> bool:
    return bool(ray.cluster_resources().get("GPU", 0))


def cpus_per_gpu() -> list[float]:
    """For each node with GPUs, its CPUs for each of them."""
    resources = [node["Resources"] for node in nodes()]
    return [each.get("CPU", 0) / each["GPU"] for each in resources if each.get("GPU")]


def require(cpus: float, key: str) -> None:
    """Work that can never be placed would wait for ever: say so, and on one machine of ours raise UsageError."""
    there = ray.cluster_resources().get("CPU", 0)
    if cpus > there:
        message = f"{key} asks for {cpus:g} CPUs at once, the cluster has {there:g}"
        if len(nodes()) == 1:
            raise UsageError(f"{message}; ask for less, or connect to a larger cluster with RAY_ADDRESS")
        say(f"{message}: waiting until it has grown")


def refuse_local(uri: str, what: str) -> None:
    """On more than one node a local path means another folder on each: raise UsageError."""
    if is_local(uri) and len(nodes()) > 1:
        raise UsageError(
            f"{what} is the local path {uri}, but the cluster has {len(nodes())} nodes, which would each see "
            "their own; use object storage or a shared file system under an fsspec URI"
        )


@contextlib.contextmanager
def stoppable(what: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run inside with its workers, and raise StoppedError.

    NOTE Ray's trainer takes SIGINT for itself, for good, and answers it with sys.exit(0), a success; SIGTERM would
    leave the workers at work.
    """
    if threading.current_thread() is not threading.main_thread():  # in a sweep's trial, which has no say in signals
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs are started without one
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        raise StoppedError(f"{what} was stopped; the same command again goes on from the last checkpoint") from stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
