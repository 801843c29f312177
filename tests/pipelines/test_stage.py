"""A stage runs once for what decides its result, and what it leaves behind says so."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import stage
from pipelines.config import PrepareConfig, Section, TrainConfig
from pipelines.errors import RepsepError, StorageError, UsageError
from pipelines.stage import (
    LATEST,
    LEASE,
    STARTED,
    SUCCESS,
    Done,
    Receipt,
    StageRun,
    WouldRunError,
    code_version,
    digest_of,
    latest_receipt,
    planning,
    read_receipt,
    resting_on,
    run_stage,
    verifying,
)
from pipelines.storage import Folder

PACKAGES = ("repsep_model",)


@pytest.fixture(autouse=True)
def quick_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded about the installation takes a second to find out and is the same in every test."""
    monkeypatch.setattr(stage, "git_revision", lambda: "abc")
    monkeypatch.setattr(stage, "package_versions", lambda: {"python": "3"})
    monkeypatch.setattr(stage, "TAKEOVER_S", 0.0)


class Body:
    """A stage's body that counts its calls."""

    def __init__(self, do: Callable[[StageRun], None] | None = None) -> None:
        self.calls, self.do = 0, do
        self.places: list[Folder] = []

    def __call__(self, run: StageRun) -> None:
        self.calls += 1
        self.places.append(run.folder)
        run.folder.write("out/data.bin", b"0123456789")
        run.outputs = ["out/data.bin"]
        run.results = {"figure": 0.5, "call": self.calls}
        if self.do is not None:
            self.do(run)


def fails(_: StageRun) -> None:
    raise RuntimeError("it failed")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Receipt]:
    def call(body: Callable[[StageRun], None], config: Section | None = None, **more: Any) -> Receipt:
        settings: dict[str, Any] = {"inputs": {"data": "d1"}, "packages": PACKAGES} | more
        return run_stage("prepare", workspace=str(tmp_path), config=config or PrepareConfig(), body=body, **settings)

    return call


def test_the_second_call_is_cached_and_gives_the_same(run: Callable[..., Receipt]) -> None:
    body = Body()
    first, again = run(body), run(body)
    assert body.calls == 1
    assert (first.cached, again.cached) == (False, True)
    assert again == first
    assert again.results == {"figure": 0.5, "call": 1}


def test_a_changed_setting_or_input_runs_again(run: Callable[..., Receipt]) -> None:
    body = Body()
    places = {
        run(body).uri,
        run(body, PrepareConfig(seed=1)).uri,
        run(body, inputs={"data": "d2"}).uri,
        run(body, inputs={"data": "d1", "more": "d2"}).uri,
    }
    assert body.calls == len(places) == 4


def test_two_stages_with_the_same_settings_do_not_share_a_result(tmp_path: Path) -> None:
    body = Body()
    for name in ("prepare", "evaluate"):
        run_stage(name, workspace=str(tmp_path), config=PrepareConfig(), inputs={}, packages=PACKAGES, body=body)
    assert body.calls == 2


def test_a_change_of_the_code_runs_again(run: Callable[..., Receipt], monkeypatch: pytest.MonkeyPatch) -> None:
    body = Body()
    run(body)
    monkeypatch.setattr(stage, "code_version", lambda packages: "another version of the source")
    assert not run(body).cached
    assert body.calls == 2


def test_the_code_version_follows_names_and_contents_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "someones_stage"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "part.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = code_version(["someones_stage"])
    (package / "notes.md").write_text("not source")
    assert code_version(["someones_stage"]) == first
    (package / "inner" / "part.py").write_text("x = 2\n")
    changed = code_version(["someones_stage"])
    (package / "inner" / "part.py").rename(package / "inner" / "piece.py")
    renamed = code_version(["someones_stage"])
    assert len({first, changed, renamed, code_version(["someones_stage", "repsep_model"])}) == 4


def test_where_it_runs_does_not_matter(run: Callable[..., Receipt]) -> None:
    body = Body()
    run(body, TrainConfig())
    moved = TrainConfig.model_validate({"runtime": {"workers": 7, "log_every": 1}})
    assert run(body, moved).cached
    assert body.calls == 1


@pytest.mark.parametrize("damage", [None, b"01234", b"0123456789a"], ids=["missing", "truncated", "longer"])
def test_an_output_that_is_not_whole_runs_again(run: Callable[..., Receipt], damage: bytes | None) -> None:
    body = Body()
    folder = run(body).folder
    if damage is None:
        folder.delete("out/data.bin")
    else:
        folder.write("out/data.bin", damage)
    again = run(body)
    assert (body.calls, again.cached) == (2, False)
    assert folder.read("out/data.bin") == b"0123456789"
    assert run(body).cached


def test_a_stage_that_must_look_again_is_never_cached(run: Callable[..., Receipt]) -> None:
    body = Body()
    run(body, again="the registry is another")
    run(body, again="the registry is another")
    assert body.calls == 2


def test_verifying_finds_an_output_of_the_same_size_that_was_changed(run: Callable[..., Receipt]) -> None:
    body = Body()
    folder = run(body).folder
    folder.write("out/data.bin", b"012345678X")
    assert run(body).cached
    with verifying():
        assert not run(body).cached
    assert folder.read("out/data.bin") == b"0123456789"
    with verifying():
        assert run(body).cached


def test_a_plan_runs_and_writes_nothing_and_says_why(run: Callable[..., Receipt], tmp_path: Path) -> None:
    body = Body()

    def why(*arguments: Any, **more: Any) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with planning(), pytest.raises(WouldRunError) as stopped:
            run(body, *arguments, **more)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return stopped.value.why

    assert why() == "it was never run in this workspace"
    folder = run(body).folder
    with planning():
        assert run(body).cached
    assert why(PrepareConfig(seed=3)) == "seed: 0 -> 3"
    assert why(inputs={"data": "d2"}) == "another data"
    assert why(again="the registry is another") == "the registry is another"
    folder.delete("out/data.bin")
    assert why() == "changed or missing: out/data.bin"
    with pytest.raises(RuntimeError):
        run(fails, PrepareConfig(seed=4))
    assert why(PrepareConfig(seed=4)) == "it was begun and is not done"
    assert body.calls == 1


def test_a_plan_says_that_the_code_changed(run: Callable[..., Receipt], monkeypatch: pytest.MonkeyPatch) -> None:
    run(Body())
    monkeypatch.setattr(stage, "code_version", lambda packages: "another version of the source")
    with planning(), pytest.raises(WouldRunError, match="the code changed"):
        run(Body())


def test_what_is_asked_before_a_stage_runs_is_not_asked_where_it_is_done(
    run: Callable[..., Receipt], tmp_path: Path
) -> None:
    asked: list[str] = []

    def refuses() -> None:
        asked.append("asked")
        raise UsageError("it would be for nothing")

    for mode in (contextlib.nullcontext, planning):
        with mode(), pytest.raises(UsageError, match="for nothing"):
            run(Body(), before=refuses)
    assert not list(tmp_path.iterdir()), "it was begun"
    run(Body())
    asked.clear()
    assert run(Body(), before=refuses).cached
    assert asked == []


def test_what_a_plan_finds_done_is_what_later_stages_take(run: Callable[..., Receipt], tmp_path: Path) -> None:
    first = run(Body(), PrepareConfig(seed=1))
    last = run(Body(), PrepareConfig(seed=2))
    with planning():
        run(Body(), PrepareConfig(seed=1))
        assert latest_receipt(str(tmp_path), "prepare").uri == first.uri
    assert latest_receipt(str(tmp_path), "prepare").uri == last.uri


def test_a_workflow_rests_on_its_own_stages_whatever_another_does_in_between(
    run: Callable[..., Receipt], tmp_path: Path
) -> None:
    own: Done = {}
    with resting_on(own):
        first = run(Body(), PrepareConfig(seed=1))
    last = run(Body(), PrepareConfig(seed=2))
    assert latest_receipt(str(tmp_path), "prepare") == last
    with resting_on(own):
        assert latest_receipt(str(tmp_path), "prepare") == first
        run(Body(), PrepareConfig(seed=3), latest=False)
        assert latest_receipt(str(tmp_path), "prepare") == first
        with planning():
            assert latest_receipt(str(tmp_path), "prepare") == first
    assert latest_receipt(str(tmp_path), "prepare") == last


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\x00"])
def test_a_damaged_pointer_is_named_and_the_stage_mends_it(
    run: Callable[..., Receipt], tmp_path: Path, content: bytes
) -> None:
    receipt = run(Body())
    pointer = tmp_path / "prepare" / LATEST
    pointer.write_bytes(content)
    with pytest.raises(RepsepError, match=rf"{pointer} is damaged; delete it and run `repsep prepare` again"):
        latest_receipt(str(tmp_path), "prepare")
    assert run(Body()).cached
    assert latest_receipt(str(tmp_path), "prepare") == receipt


def test_the_receipt_says_what_went_in_and_what_came_out(run: Callable[..., Receipt]) -> None:
    receipt = run(Body(), PrepareConfig(seed=3))
    written = json.loads(receipt.folder.read(SUCCESS))
    assert written["inputs"] == {"data": "d1"}
    assert written["config"]["seed"] == 3
    assert written["revision"] == "abc"
    assert written["outputs"] == {
        "out/data.bin": {"size": 10, "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"}
    }
    assert receipt.uri.endswith(f"/prepare/{receipt.fingerprint[:12]}")
    assert receipt.digest == written.pop("digest") == digest_of(written)


@pytest.mark.parametrize(
    "alter",
    [
        lambda text: text.replace('"figure": 0.5', '"figure": 0.9'),
        lambda text: text.replace('"size": 10', '"size": 11'),
        lambda text: text[: len(text) // 2],
        lambda text: "",
    ],
    ids=["figure", "size", "half", "empty"],
)
def test_an_altered_receipt_is_refused(run: Callable[..., Receipt], alter: Callable[[str], str]) -> None:
    body = Body()
    folder = run(body).folder
    text = folder.read(SUCCESS).decode()
    assert alter(text) != text
    folder.write(SUCCESS, alter(text).encode())
    for read in (lambda: run(body), lambda: read_receipt(folder)):
        with pytest.raises(RepsepError, match="delete that folder") as caught:
            read()
        assert folder.uri in str(caught.value)
    assert body.calls == 1


def test_a_body_that_fails_leaves_no_receipt(run: Callable[..., Receipt]) -> None:
    broken = Body(fails)
    with pytest.raises(RuntimeError, match="failed"):
        run(broken, lease=True)
    (folder,) = broken.places
    assert read_receipt(folder) is None
    assert folder.read_if_present(LEASE) is None
    assert not run(Body(), lease=True).cached


def test_the_next_attempt_continues_what_the_first_began(run: Callable[..., Receipt]) -> None:
    numbers = iter(["run-1", "run-2"])
    seen = []

    def begin() -> dict[str, str]:
        return {"mlflow_run": next(numbers)}

    def dies(attempt: StageRun) -> None:
        seen.append(attempt.started)
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Body(dies), begin=begin)
    receipt = run(Body(dies), begin=begin)
    assert [s["mlflow_run"] for s in seen] == ["run-1", "run-1"]
    assert seen[0]["started_at"] == seen[1]["started_at"]
    assert json.loads(receipt.folder.read(STARTED)) == seen[0]


def test_the_record_of_the_start_is_there_before_the_work(run: Callable[..., Receipt]) -> None:
    def look(attempt: StageRun) -> None:
        assert attempt.folder.read_if_present(STARTED) is not None
        assert attempt.folder.read_if_present(SUCCESS) is None

    assert run(Body(look)).results["call"] == 1


def test_a_cached_stage_begins_nothing(run: Callable[..., Receipt]) -> None:
    run(Body())
    assert run(Body(), begin=lambda: pytest.fail("a run was begun for nothing")).cached


def test_a_second_run_is_refused_while_the_first_is_at_work(run: Callable[..., Receipt]) -> None:
    second = Body()

    def meanwhile(attempt: StageRun) -> None:
        with pytest.raises(RepsepError) as caught:
            run(second, lease=True)
        said = str(caught.value)
        assert f"host {socket.gethostname()}, process {os.getpid()}" in said
        assert attempt.folder.uri in said
        assert "another prepare" in said

    first = Body(meanwhile)
    receipt = run(first, lease=True)
    assert (first.calls, second.calls) == (1, 0)
    assert receipt.folder.read_if_present(LEASE) is None, "a finished run holds no lease"


def holder(**changes: object) -> bytes:
    found: dict[str, object] = {"host": "elsewhere", "pid": 1, "token": "theirs", "renewed_at": time.time()}
    return json.dumps(found | changes).encode()


@pytest.fixture
def leased(run: Callable[..., Receipt]) -> Callable[[bytes], Folder]:
    """Puts a lease of someone else into the folder that the stage is going to use."""

    def put(content: bytes) -> Folder:
        folder = run(Body()).folder
        folder.delete(SUCCESS)
        folder.write(LEASE, content)
        return folder

    return put


@pytest.mark.parametrize("age", [0, 60, 88])
def test_a_lease_of_another_machine_counts_while_it_is_fresh(
    run: Callable[..., Receipt], leased: Callable[[bytes], Folder], age: float
) -> None:
    folder = leased(holder(renewed_at=time.time() - age))
    body = Body()
    with pytest.raises(RepsepError, match="host elsewhere, process 1"):
        run(body, lease=True)
    assert body.calls == 0
    assert json.loads(folder.read(LEASE))["token"] == "theirs", "what was refused must not touch the lease"


def test_a_lease_that_nobody_renews_is_taken_over(
    run: Callable[..., Receipt], leased: Callable[[bytes], Folder]
) -> None:
    leased(holder(renewed_at=time.time() - 91))
    body = Body(lambda r: own.append(json.loads(r.folder.read(LEASE))))
    own: list[dict[str, Any]] = []
    run(body, lease=True)
    assert body.calls == 1
    assert own[0]["pid"] == os.getpid()
    assert time.time() - own[0]["renewed_at"] < 60


def test_a_lease_of_a_dead_process_on_this_host_is_not_waited_for(
    run: Callable[..., Receipt], leased: Callable[[bytes], Folder]
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    body = Body()
    leased(holder(host=socket.gethostname(), boot=stage._boot(), pid=child.pid))
    run(body, lease=True)
    assert body.calls == 1


def test_a_process_id_of_another_boot_or_container_says_nothing(
    run: Callable[..., Receipt], leased: Callable[[bytes], Folder]
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    leased(holder(host=socket.gethostname(), boot="another", pid=child.pid))
    with pytest.raises(RepsepError, match=f"process {child.pid}"):
        run(Body(), lease=True)


def test_a_lease_of_a_living_process_on_this_host_counts(
    run: Callable[..., Receipt], leased: Callable[[bytes], Folder]
) -> None:
    leased(holder(host=socket.gethostname(), boot=stage._boot(), pid=os.getppid()))
    with pytest.raises(RepsepError, match=f"process {os.getppid()}"):
        run(Body(), lease=True)


def test_the_lease_is_renewed_while_the_work_goes_on(
    run: Callable[..., Receipt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "LEASE_REFRESH_S", 0.001)

    def long_work(attempt: StageRun) -> None:
        first = json.loads(attempt.folder.read(LEASE))["renewed_at"]
        deadline = time.monotonic() + 10
        while json.loads(attempt.folder.read(LEASE))["renewed_at"] == first:
            assert time.monotonic() < deadline, "it was never renewed"

    assert run(Body(long_work), lease=True).folder.read_if_present(LEASE) is None


def test_a_run_that_was_taken_over_leaves_neither_a_receipt_nor_touches_the_new_lease(
    run: Callable[..., Receipt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "LEASE_REFRESH_S", 0.001)
    threads: list[Any] = []

    def sleeps_too_long(attempt: StageRun) -> None:
        (renewing,) = [t for t in stage.threading.enumerate() if t.name == "lease-prepare"]
        threads.append(renewing)
        deadline = time.monotonic() + 10
        while renewing.is_alive():
            assert time.monotonic() < deadline, "it goes on renewing what is no longer its own"
            attempt.folder.write(LEASE, holder())  # again, if it was overwritten between a look and a write
            renewing.join(0.01)

    body = Body(sleeps_too_long)
    with pytest.raises(RepsepError, match=r"another prepare took over .* while this one was silent"):
        run(body, lease=True)
    (folder,) = body.places
    assert not threads[0].is_alive()
    assert json.loads(folder.read(LEASE))["token"] == "theirs"
    assert read_receipt(folder) is None, "two runs wrote there: neither is taken for whole before the other ends"


def test_of_two_that_take_over_at_once_one_goes_on(
    run: Callable[..., Receipt], leased: Callable[[bytes], Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = leased(holder(renewed_at=time.time() - 91))
    monkeypatch.setattr(stage.time, "sleep", lambda _: folder.write(LEASE, holder(token="quicker")))
    body = Body()
    with pytest.raises(RepsepError, match="took over"):
        run(body, lease=True)
    assert body.calls == 0
    assert json.loads(folder.read(LEASE))["token"] == "quicker"


def test_a_storage_that_stumbles_does_not_end_the_renewing(
    run: Callable[..., Receipt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "LEASE_REFRESH_S", 0.001)
    write, failed = Folder.write, []

    def stumbles(folder: Folder, key: str, data: bytes) -> None:
        if key == LEASE and len(failed) < 2:
            failed.append(key)
            raise StorageError("try again")
        write(folder, key, data)

    def long_work(attempt: StageRun) -> None:
        first = json.loads(attempt.folder.read(LEASE))["renewed_at"]
        deadline = time.monotonic() + 10
        while json.loads(attempt.folder.read(LEASE))["renewed_at"] == first:
            assert time.monotonic() < deadline, "it gave up"

    monkeypatch.setattr(Folder, "write", stumbles)
    run(Body(long_work), lease=True)
    assert len(failed) == 2


def test_the_latest_receipt_is_that_of_the_stage_last_done_or_found_done(
    run: Callable[..., Receipt], tmp_path: Path
) -> None:
    receipts = [run(Body(), PrepareConfig(seed=seed)) for seed in (3, 1, 2)]
    assert latest_receipt(str(tmp_path), "prepare") == receipts[2]
    assert run(Body(), PrepareConfig(seed=1)).cached
    assert latest_receipt(str(tmp_path), "prepare") == receipts[1]
    with pytest.raises(RuntimeError, match="failed"):
        run(Body(fails), PrepareConfig(seed=9))
    assert latest_receipt(str(tmp_path), "prepare") == receipts[1]


def test_a_stage_in_passing_is_not_what_the_next_one_takes(run: Callable[..., Receipt], tmp_path: Path) -> None:
    first = run(Body())
    for _ in range(2):  # done, then found done
        run(Body(), PrepareConfig(seed=1), latest=False)
        assert latest_receipt(str(tmp_path), "prepare") == first


def test_where_no_run_has_finished_the_command_to_run_is_named(run: Callable[..., Receipt], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed"):
        run(Body(fails))
    with pytest.raises(RepsepError, match="run `repsep prepare`"):
        latest_receipt(str(tmp_path), "prepare")


def test_what_was_recorded_at_the_start_can_be_replaced(run: Callable[..., Receipt]) -> None:
    body = Body(lambda r: r.restart({"mlflow_run": "run-2"}))
    folder = run(body, begin=lambda: {"mlflow_run": "run-1"}).folder
    found = json.loads(folder.read(STARTED))
    assert found["mlflow_run"] == "run-2"
    assert time.time() - found["started_at"] < 60


def test_no_secret_of_the_environment_is_written(
    run: Callable[..., Receipt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real record of versions and revision
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBY",
        "MLFLOW_TRACKING_PASSWORD": "hunter2-hunter2",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run(Body(), lease=True)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"versions" in written
    assert not [name for name, value in secrets.items() if value.encode() in written]


def test_a_stage_on_object_storage_is_cached_as_well(s3: str) -> None:
    body = Body()
    receipts = [
        run_stage(
            "prepare",
            workspace=f"s3://{s3}/work",
            config=PrepareConfig(),
            inputs={},
            packages=PACKAGES,
            body=body,
            lease=True,
        )
        for _ in range(2)
    ]
    assert body.calls == 1
    assert [r.cached for r in receipts] == [False, True]
    assert latest_receipt(f"s3://{s3}/work", "prepare") == receipts[0]
    assert sorted(e.key for e in receipts[0].folder.list()) == [STARTED, SUCCESS, "out/data.bin"]
