"""What a stage is: a fingerprint of all that decides its result, a folder of its own, a receipt at the end.

    <workspace>/<stage>/<fingerprint[:12]>/_STARTED.json    first: the MLflow run to continue
                                           ...              what the stage makes
                                           _SUCCESS.json    last, in one PUT: what went in and came out, its digest

A receipt with the same fingerprint means that the work is done. Resuming a workflow is running it again. While it is
only planned, a stage that would run raises `WouldRunError` instead, and nothing is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipelines.config import Section
from pipelines.errors import RepsepError, StorageError
from pipelines.progress import say
from pipelines.storage import Folder

STARTED, SUCCESS, LEASE, LATEST = "_STARTED.json", "_SUCCESS.json", "_LEASE.json", "_LATEST.json"
LEASE_REFRESH_S = 20.0
LEASE_EXPIRES_S = 90.0
TAKEOVER_S = 1.0
RECORDED_PACKAGES = ("ray", "torch", "torchvision", "timm", "mlflow", "pyarrow", "numpy", "pillow", "fsspec", "s3fs")


class WouldRunError(Exception):
    """Raised instead of running a stage while a workflow is planned. Says why it would run."""

    def __init__(self, stage: str, why: str) -> None:
        super().__init__(f"{stage}: {why}")
        self.stage, self.why = stage, why


Done = dict[tuple[str, str], Folder]
"""The folder of each (workspace, stage) that was done, or found done."""

_own: ContextVar[Done | None] = ContextVar("own", default=None)
_planned: ContextVar[bool] = ContextVar("planned", default=False)
_verified: ContextVar[bool] = ContextVar("verified", default=False)
T = TypeVar("T")

# NOTE none of these around a `yield` of a generator: between two of its items what it set holds for its caller too.


@contextlib.contextmanager
def resting_on(own: Done) -> Iterator[None]:
    """For the time of the block stages take what `own` holds, and add to it, rather than the workspace's pointers.

    Those are shared: another workflow may move them between two stages of this one.
    """
    with _set(_own, own):
        yield


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """For the time of the block stages look what is done and run nothing."""
    own = _own.get()
    with _set(_planned, True), resting_on({} if own is None else own):
        yield


@contextlib.contextmanager
def verifying() -> Iterator[None]:
    """For the time of the block a receipt counts only if its files have its digests, not just its sizes."""
    with _set(_verified, True):
        yield


@contextlib.contextmanager
def _set(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def is_planning() -> bool:
    return _planned.get()


@dataclass(frozen=True)
class Receipt:
    """What `_SUCCESS.json` says. `results` are the stage's figures, `outputs` its files with size and SHA-256."""

    stage: str
    fingerprint: str
    uri: str
    inputs: dict[str, str]
    results: dict[str, Any]
    outputs: dict[str, dict[str, Any]]
    finished_at: float
    seconds: float
    digest: str
    cached: bool = field(default=False, compare=False)

    @property
    def folder(self) -> Folder:
        return Folder(self.uri)


@dataclass
class StageRun:
    """A stage at work: its folder, what was recorded at its start, and where it puts its figures."""

    folder: Folder
    fingerprint: str
    started: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    def restart(self, started: Mapping[str, Any]) -> None:
        """Replace what was recorded at the start."""
        self.started = dict(started)
        self.folder.write(STARTED, json.dumps(self.started | {"started_at": time.time()}).encode())


def run_stage(
    name: str,
    *,
    workspace: str,
    config: Section,
    inputs: Mapping[str, str],
    packages: Iterable[str],
    body: Callable[[StageRun], None],
    lease: bool = False,
    again: str = "",
    latest: bool = True,
    begin: Callable[[], Mapping[str, Any]] | None = None,
    before: Callable[[], None] | None = None,
) -> Receipt:
    """Run `body` unless a receipt says that it is done.

    `inputs` are digests by name; `packages` those of this project that the stage imports, whose source counts; `begin`
    gives what `_STARTED.json` keeps for a run that continues this one. With `lease`, a second run at the same time is
    refused; `again` says why a receipt that is there does not count; without `latest` later stages do not take this one
    as their input. `before` is called where the stage would run, also while planning, and may refuse it by raising.
    """
    fingerprint = fingerprint_of(name, config, inputs, packages)
    folder = Folder(workspace) / name / fingerprint[:12]
    done = read_receipt(folder)
    damaged = _damaged(folder, done) if done is not None else []
    if done is not None and not again and not damaged:
        if latest:
            _point_to(workspace, name, folder)
        return Receipt(**(_fields(done) | {"cached": True}))
    if damaged:
        again = f"changed or missing: {', '.join(damaged[:3])}{' and more' if len(damaged) > 3 else ''}"
    if before is not None:
        before()
    if is_planning():
        raise WouldRunError(name, again or _why(workspace, name, folder, config, inputs, packages))
    if damaged:
        say(f"{name}: warning: it is done again, for of its outputs in {folder.uri} these are {again}")
    began = time.time()
    with Lease(folder, name) if lease else contextlib.nullcontext() as held:
        run = StageRun(folder, fingerprint, _started(folder, begin))
        body(run)
        receipt = {
            "stage": name,
            "fingerprint": fingerprint,
            "uri": folder.uri,
            "inputs": dict(inputs),
            "config": config.model_dump(mode="json"),
            "code": code_version(packages),
            "results": run.results,
            "outputs": {
                key: {"size": folder.size_of(key), "sha256": folder.sha256(key)} for key in sorted(run.outputs)
            },
            "revision": git_revision(),
            "versions": package_versions(),
            "finished_at": time.time(),
            "seconds": round(time.time() - began, 3),
        }
        receipt["digest"] = digest_of(receipt)
        if held is not None:
            held.check()
        folder.write(SUCCESS, json.dumps(receipt, indent=1, sort_keys=True).encode())
    if latest:
        _point_to(workspace, name, folder)
    return Receipt(**_fields(receipt))


def latest_receipt(workspace: str, stage: str) -> Receipt:
    """The receipt of the stage that was last done, or found done, in this workspace. Raises RepsepError if none was."""
    found = latest_if_any(workspace, stage)
    if found is None:
        raise RepsepError(f"no finished {stage} in {workspace}; run `repsep {stage}` with the same recipe first")
    return found


def latest_if_any(workspace: str, stage: str) -> Receipt | None:
    """As `latest_receipt`, None where the stage was never done in this workspace."""
    values = _latest(workspace, stage)
    return None if values is None else Receipt(**_fields(values))


def receipt_at(uri: str) -> Receipt | None:
    """The receipt of the stage that wrote into this folder, None where it is gone."""
    values = read_receipt(Folder(uri))
    return None if values is None else Receipt(**_fields(values))


def _latest(workspace: str, stage: str) -> dict[str, Any] | None:
    root, own = Folder(workspace) / stage, _own.get()
    if own is not None and (workspace, stage) in own:
        return read_receipt(own[workspace, stage])
    pointer = root.read_if_present(LATEST)
    if pointer is None:
        return None
    try:
        name = str(json.loads(pointer)["folder"])
    except (ValueError, LookupError, TypeError):
        raise RepsepError(
            f"{root.uri_of(LATEST)} is damaged; delete it and run `repsep {stage}` again: what is done is found"
        ) from None
    return read_receipt(root / name)


def _why(
    workspace: str, name: str, folder: Folder, config: Section, inputs: Mapping[str, str], packages: Iterable[str]
) -> str:
    """What differs from the latest run of the stage."""
    if folder.read_if_present(STARTED) is not None:
        return "it was begun and is not done"
    before = _latest(workspace, name)
    if before is None:
        return "it was never run in this workspace"
    reasons = _differences(before["config"], config)
    reasons += [f"another {key}" for key in sorted(inputs) if before["inputs"].get(key) != inputs[key]]
    if before.get("code") != code_version(packages):
        reasons.append("the code changed")
    return "; ".join(reasons)


def changed_settings(workspace: str, stage: str, config: Section) -> list[str]:
    """`key: old -> new` of what differs from the latest run of the stage, nothing where there was none."""
    before = _latest(workspace, stage)
    return [] if before is None else _differences(before["config"], config)


def _differences(before: Mapping[str, Any], config: Section) -> list[str]:
    old, new = (dict(_leaves(values)) for values in (before, config.model_dump(mode="json")))
    return [
        f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith("runtime.")
    ]


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _point_to(workspace: str, stage: str, folder: Folder) -> None:
    if (own := _own.get()) is not None:
        own[workspace, stage] = folder
    if is_planning():
        return
    pointer = json.dumps({"folder": folder.uri.rpartition("/")[2]}).encode()
    root = Folder(workspace) / stage
    if root.read_if_present(LATEST) != pointer:
        root.write(LATEST, pointer)


def read_receipt(folder: Folder) -> dict[str, Any] | None:
    """The receipt in a stage's folder, None where the stage has not finished. Raises RepsepError if it was altered."""
    data = folder.read_if_present(SUCCESS)
    if data is None:
        return None
    try:
        receipt: dict[str, Any] = json.loads(data)
    except ValueError:
        receipt = {}
    if receipt.pop("digest", None) != (digest := digest_of(receipt)):
        raise RepsepError(
            f"{folder.uri_of(SUCCESS)} does not match its own digest; delete that folder to run the stage again"
        )
    return receipt | {"digest": digest}


def fingerprint_of(name: str, config: Section, inputs: Mapping[str, str], packages: Iterable[str]) -> str:
    """SHA-256 of the config without its `runtime` part, the input digests and the code version."""
    settings = config.model_dump(mode="json", exclude={"runtime"})
    return digest_of({"stage": name, "config": settings, "inputs": dict(inputs), "code": code_version(packages)})


def code_version(packages: Iterable[str]) -> str:
    """SHA-256 over the .py files of packages of this project. The git revision would change with the README."""
    digest = hashlib.sha256()
    for package in sorted(packages):
        (root,) = importlib.import_module(package).__path__
        for file in sorted(Path(root).rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in RECORDED_PACKAGES
    }


def git_revision() -> str | None:
    """The checkout's revision where there is one; recorded, never compared."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _fields(receipt: Mapping[str, Any]) -> dict[str, Any]:
    names = ("stage", "fingerprint", "uri", "inputs", "results", "outputs", "finished_at", "seconds", "digest")
    return {name: receipt[name] for name in names}


def _damaged(folder: Folder, receipt: Mapping[str, Any]) -> list[str]:
    """The outputs that are not what the receipt says: of another size, or while verifying of another digest."""
    return [
        key
        for key, output in receipt["outputs"].items()
        if folder.size_of(key) != output["size"] or (_verified.get() and folder.sha256(key) != output["sha256"])
    ]


def _started(folder: Folder, begin: Callable[[], Mapping[str, Any]] | None) -> dict[str, Any]:
    data = folder.read_if_present(STARTED)
    if data is None:
        found = dict(begin()) if begin is not None else {}
        folder.create(STARTED, json.dumps(found | {"started_at": time.time()}).encode())
        data = folder.read(STARTED)
    values: dict[str, Any] = json.loads(data)
    return values


class Lease:
    """An object refreshed every 20 s by the one run that may write here; another may take over after 90 s of silence.

    A holder on this machine whose process is gone is silent for good, so it is not waited for.
    """

    def __init__(self, folder: Folder, stage: str) -> None:
        self.folder, self.stage = folder, stage
        self.owner = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "token": os.urandom(8).hex()}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._refresh, daemon=True, name=f"lease-{stage}")

    def __enter__(self) -> Lease:
        if not self.folder.create(LEASE, self._content()):
            holder = json.loads(self.folder.read_if_present(LEASE) or b"{}")
            age = time.time() - holder.get("renewed_at", 0)
            if age < LEASE_EXPIRES_S and not _is_gone(holder):
                raise RepsepError(
                    f"another {self.stage} with this config is at work in {self.folder.uri} "
                    f"(host {holder.get('host')}, process {holder.get('pid')}, last heard of {age:.0f} s ago); "
                    f"wait for it, or {LEASE_EXPIRES_S:.0f} s if it is dead"
                )
            self.folder.write(LEASE, self._content())
            time.sleep(TAKEOVER_S)  # of two that take over at once the later writer wins, and both look after that
            self.check()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        if self._is_ours():
            self.folder.delete(LEASE)

    def check(self) -> None:
        """Raises RepsepError if another run has taken over: what this one made must not be taken for whole."""
        if not self._is_ours():
            raise RepsepError(f"another {self.stage} took over {self.folder.uri} while this one was silent; it goes on")

    def _content(self) -> bytes:
        return json.dumps(self.owner | {"renewed_at": time.time()}).encode()

    def _refresh(self) -> None:
        while not self.stopped.wait(LEASE_REFRESH_S):
            with contextlib.suppress(StorageError):  # three refreshes may be missed before the lease expires
                if not self._is_ours():
                    return  # this machine slept, and another run took over
                self.folder.write(LEASE, self._content())

    def _is_ours(self) -> bool:
        holder = json.loads(self.folder.read_if_present(LEASE) or b"{}")
        return holder.get("token") in (self.owner["token"], None)


def _is_gone(holder: Mapping[str, Any]) -> bool:
    if (holder.get("host"), holder.get("boot")) != (socket.gethostname(), _boot()):
        return False
    try:
        os.kill(int(holder.get("pid", 0)), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _boot() -> str:
    """Where a process id means something: this boot of this machine, in this container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
