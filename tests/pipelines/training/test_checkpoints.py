"""What a run goes on from: a damaged checkpoint is never taken, a failed one ends nothing, nothing begins anew."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import RepsepError, StorageError
from pipelines.training.checkpoint_folder import PREFIX, RECORD, CheckpointFolder, DamagedCheckpointError, Record
from pipelines.training.checkpoints import LOCAL, Checkpoints, CheckpointsFailedError
from pipelines.training.parallel import Group


def record(step: int, writers: int = 1) -> Record:
    return Record(step, 0.5, step, {"loss": 1.0}, model="m", world_size=writers, writers=writers)


def content(step: int) -> bytes:
    return b"weights of step %d" % step * 100


def write(step: int) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "state.pt").write_bytes(content(step))
        (folder / "best").mkdir()
        (folder / "best/model.safetensors").write_bytes(b"best")

    return fill


def run(folder: Path, *steps: int) -> Checkpoints:
    """A run that saved checkpoints at these steps."""
    checkpoints = Checkpoints(str(folder), Group(), writers=1)
    for step in steps:
        checkpoints.save(record(step), write(step))
    checkpoints.settle()
    checkpoints.close()
    return checkpoints


def restored(folder: Path) -> tuple[int, bytes] | None:
    """Step and content of what a new run goes on from."""
    found: list[tuple[int, bytes]] = []

    def read(directory: Path, record: Record) -> None:
        found.append((record.step, (directory / "state.pt").read_bytes()))

    given = Checkpoints(str(folder), Group(), writers=1).restore(read)
    assert (given is None) == (not found)
    return found[0] if found else None


def of_step(folder: Path, step: int) -> Path:
    (found,) = folder.glob(f"{PREFIX}{step:08d}_*")
    return found


def truncate(checkpoint: Path) -> None:
    (checkpoint / "state.pt").write_bytes((checkpoint / "state.pt").read_bytes()[:-1])


def flip_a_bit(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "state.pt").read_bytes())
    data[7] ^= 1
    (checkpoint / "state.pt").write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "changed": flip_a_bit,
    "without its tensors": lambda c: (c / "state.pt").unlink(),
    "without its best model": lambda c: (c / "best/model.safetensors").unlink(),
    "without its record": lambda c: (c / RECORD).unlink(),
    "with half a record": lambda c: (c / RECORD).write_bytes((c / RECORD).read_bytes()[:30]),
    "with an empty record": lambda c: (c / RECORD).write_bytes(b"{}"),
    "of another format": lambda c: (c / RECORD).write_text('{"format": 99}'),
}


def test_a_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, 4, 8)
    assert restored(tmp_path) == (8, content(8))


def test_a_run_without_checkpoints_starts_at_the_beginning(tmp_path: Path) -> None:
    assert restored(tmp_path) is None
    assert restored(tmp_path / "nothing") is None


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    damage: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, 4, 8)
    damage(of_step(tmp_path, 8))
    assert restored(tmp_path) == (4, content(4))
    assert of_step(tmp_path, 8).name in capsys.readouterr().err


FINISHED = {name: damage for name, damage in DAMAGE.items() if name != "without its record"}


@pytest.mark.parametrize("damage", FINISHED.values(), ids=FINISHED)
def test_where_all_are_damaged_the_run_does_not_silently_begin_anew(
    damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    run(tmp_path, 4, 8)
    for step in (4, 8):
        damage(of_step(tmp_path, step))
    with pytest.raises(RepsepError, match=r"none of the 2 checkpoints .* is whole; to train from the start, delete"):
        restored(tmp_path)
    assert of_step(tmp_path, 4).is_dir()


def test_an_only_checkpoint_that_is_damaged_is_an_error_too(tmp_path: Path) -> None:
    run(tmp_path, 4)
    truncate(of_step(tmp_path, 4))
    with pytest.raises(RepsepError, match="none of the 1 checkpoints"):
        restored(tmp_path)


def test_where_no_upload_was_ever_through_the_run_begins_anew(tmp_path: Path) -> None:
    """Stopped in its first, or by a store that refused: what is not finished was never said to be saved."""
    for step in (4, 8):
        unfinished = tmp_path / f"{PREFIX}{step:08d}_00aa11bb"
        unfinished.mkdir()
        (unfinished / "state.pt").write_bytes(content(4)[:50])
    assert restored(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_had_written_for_an_upload_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getpid()):
        (tmp_path / f"{LOCAL}{pid}-checkpoint_00000004_00aa11bb-0").mkdir()
    Checkpoints(str(tmp_path / "run"), Group(), 1)
    assert [folder.name.split("-")[2] for folder in tmp_path.glob(f"{LOCAL}*")] == [str(os.getpid())]


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    run(tmp_path, 2, 4, 6, 8)
    assert sorted(int(p.name[len(PREFIX) :][:8]) for p in tmp_path.iterdir()) == [6, 8]


def test_a_resumed_run_keeps_what_it_went_on_from_until_it_has_two_of_its_own(tmp_path: Path) -> None:
    run(tmp_path, 4, 8)
    flip_a_bit(of_step(tmp_path, 8))
    resumed = Checkpoints(str(tmp_path), Group(), writers=1)
    resumed.restore(lambda *_: None)
    resumed.save(record(6), write(6))
    resumed.settle()
    resumed.close()
    assert sorted(int(p.name[len(PREFIX) :][:8]) for p in tmp_path.iterdir()) == [4, 6, 8]
    assert restored(tmp_path) == (6, content(6))


def test_a_rank_left_behind_does_not_remove_what_the_group_that_replaced_it_wrote(tmp_path: Path) -> None:
    left_behind = Checkpoints(str(tmp_path), Group(), writers=1)
    for step in (2, 4):
        left_behind.save(record(step), write(step))
    left_behind.settle()
    successor = Checkpoints(str(tmp_path), Group(), writers=1)
    successor.restore(lambda *_: None)
    for step in (6, 8):
        successor.save(record(step), write(step))
    successor.settle()
    left_behind.save(record(6), write(6))
    left_behind.settle()
    left_behind.close()
    assert restored(tmp_path) == (8, content(8))


def test_saving_waits_for_the_local_copy_only_and_the_next_one_for_the_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploading, go_on = threading.Event(), threading.Event()
    upload, order = CheckpointFolder.upload, []

    def slow(*args: Any) -> None:
        uploading.set()
        assert go_on.wait(timeout=30)
        upload(*args)
        order.append("uploaded")

    monkeypatch.setattr(CheckpointFolder, "upload", slow)
    checkpoints = Checkpoints(str(tmp_path), Group(), writers=1)
    checkpoints.save(record(4), write(4))  # would wait for ever if it waited for the upload
    assert uploading.wait(timeout=30)
    assert checkpoints.last_uri is None
    assert checkpoints.is_uploading()
    threading.Timer(0.05, go_on.set).start()

    def note(folder: Path) -> None:
        order.append("next copy")
        write(8)(folder)

    checkpoints.save(record(8), note)
    assert order[:2] == ["uploaded", "next copy"]
    checkpoints.settle()
    assert not checkpoints.is_uploading()
    checkpoints.close()


def refuse(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage refuses so many uploads."""
    upload, left = CheckpointFolder.upload, [times]

    def fails(*args: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise StorageError("s3://bucket: no space")
        upload(*args)

    monkeypatch.setattr(CheckpointFolder, "upload", fails)


def test_two_uploads_that_fail_are_warned_of_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(2, monkeypatch)
    run(tmp_path, 2, 4, 6)
    said = capsys.readouterr().err
    assert "step 2 was not saved: s3://bucket: no space" in said
    assert "step 4 was not saved" in said
    assert restored(tmp_path) == (6, content(6))


def test_the_third_failure_in_a_row_ends_the_run_and_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = run(tmp_path, 2)
    refuse(3, monkeypatch)
    checkpoints = Checkpoints(str(tmp_path), Group(), writers=1)
    checkpoints.restore(lambda *_: None)
    for step in (4, 6, 8):
        checkpoints.save(record(step), write(step))
    with pytest.raises(CheckpointsFailedError, match=r"no space.*the last whole one is .*00000002"):
        checkpoints.settle()


def test_a_full_local_disk_counts_as_a_failed_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full(folder: Path) -> None:
        (folder / "state.pt").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(str(tmp_path), Group(), writers=1)
    checkpoints.save(record(2), full)
    assert not checkpoints.settle()
    assert "No space left on device" in capsys.readouterr().err
    checkpoints.save(record(4), write(4))
    assert checkpoints.settle()


def test_a_distributed_checkpoint_is_whole_only_with_every_ranks_files(tmp_path: Path) -> None:
    store, name = CheckpointFolder(str(tmp_path / "run")), f"{PREFIX}00000004_00aa11bb"
    for rank in (0, 1):
        part = tmp_path / f"rank-{rank}"
        part.mkdir()
        (part / f"__{rank}_0.distcp").write_bytes(b"shard %d" % rank)
        if rank == 1:
            with pytest.raises(DamagedCheckpointError, match=r"files-1\.json is missing"):
                store.fetch(name, tmp_path / "early")
        store.upload(name, part, record(4, writers=2) if rank == 0 else None, rank)
    store.fetch(name, tmp_path / "whole")
    assert (tmp_path / "whole/__1_0.distcp").read_bytes() == b"shard 1"
    (tmp_path / "run" / name / "__1_0.distcp").write_bytes(b"shard 2")
    with pytest.raises(DamagedCheckpointError, match="was changed"):
        store.fetch(name, tmp_path / "changed")


def test_checkpoints_live_in_object_storage(s3: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(f"s3://{s3}/run", Group(), writers=1)
    for step in (2, 4, 6):
        checkpoints.save(record(step), write(step))
    checkpoints.settle()
    checkpoints.close()
    assert len(CheckpointFolder(f"s3://{s3}/run").names()) == 2
    found: list[bytes] = []
    again = Checkpoints(f"s3://{s3}/run", Group(), writers=1)
    again.restore(lambda folder, _: found.append((folder / "state.pt").read_bytes()))
    assert found == [content(6)]
