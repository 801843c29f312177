"""Claims about `Folder`, on a local disk, on moto and on Ceph RGW, a real store with permissions of its own."""

import errno
import hashlib
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs
import pytest
import s3fs

from pipelines import retries
from pipelines.errors import StorageError, UsageError
from pipelines.storage import TEMPORARY, Folder, absolute_uri, home
from tests.conftest import one_of_eight_creates

MOTO = "moto"
CEPH = pytest.param("ceph", marks=pytest.mark.ceph)
STORES = [MOTO, CEPH]
EVERYWHERE = ["local", *STORES]

STRANGE_KEYS = [
    "with space",
    " at the edges ",
    "a+b",
    "100%",
    "%2F%20is not decoded",
    "?a=b&c=d#e",
    "*[glob]",
    'it\'s "quoted"',
    "back\\slash",
    "$HOME~",
    "straße/日本語/🚲.png",
    "composed-\u00e9",
    "decomposed-e\u0301",
    ".hidden",
    ".folder/..two/...three",
    "n" * 200,
    f"{'f' * 200}/{'k' * 200}",
]


@pytest.fixture(params=EVERYWHERE)
def folder(request: pytest.FixtureRequest) -> Folder:
    """An empty folder: on a disk, on moto, on Ceph."""
    if request.param == "local":
        path = request.getfixturevalue("tmp_path") / "data"
        path.mkdir()
        return Folder(str(path))
    bucket = request.getfixturevalue({"moto": "s3", "ceph": "ceph_bucket"}[request.param])
    return Folder(f"s3://{bucket}/data")


def keys(folder: Folder, prefix: str = "") -> list[str]:
    return [entry.key for entry in folder.list(prefix)]


def every_operation(folder: Folder) -> dict[str, Callable[[], object]]:
    return {
        "read": lambda: folder.read("key"),
        "read_if_present": lambda: folder.read_if_present("key"),
        "write": lambda: folder.write("key", b""),
        "create": lambda: folder.create("key", b""),
        "delete": lambda: folder.delete("key"),
        "size_of": lambda: folder.size_of("key"),
        "sha256": lambda: folder.sha256("key"),
        "open": lambda: folder.open("key"),
        "list": lambda: list(folder.list()),
        "subfolders": lambda: list(folder.subfolders()),
    }


# ------------------------------------------------------------------------------------------------ objects and keys


def test_an_object_with_a_strange_key_comes_back_as_it_was(folder: Folder) -> None:
    contents = {key: f"content of {key}".encode() for key in STRANGE_KEYS}
    for key, data in contents.items():
        folder.write(key, data)
    assert [(entry.key, entry.size) for entry in folder.list()] == [
        (key, len(contents[key])) for key in sorted(contents)
    ]
    for key, data in contents.items():
        assert folder.read(key) == folder.read_if_present(key) == data
        assert folder.size_of(key) == len(data)
        assert folder.sha256(key) == hashlib.sha256(data).hexdigest()
        folder.delete(key)
    assert keys(folder) == []


def test_a_folder_in_a_folder_with_a_strange_name_is_the_same_place(folder: Folder) -> None:
    inner = folder / "a b+c%20é"
    inner.write("k", b"x")
    assert folder.read("a b+c%20é/k") == b"x"
    assert list(folder.subfolders()) == ["a b+c%20é"]
    assert Folder(inner.uri).read("k") == b"x"


def test_a_write_replaces_and_changes_the_etag(folder: Folder) -> None:
    folder.write("key", b"old")
    (before,) = folder.list()
    folder.write("key", b"newer")
    (after,) = folder.list()
    assert (folder.read("key"), after.size) == (b"newer", 5)
    assert before.etag != after.etag


def test_an_absent_object_is_none_and_deleting_it_is_no_error(folder: Folder) -> None:
    folder.write("present", b"")
    for key in ("absent", "no/such/bucket"):  # the second: no text of an error may be taken for the reason
        assert folder.read_if_present(key) is None
        assert folder.size_of(key) is None
        folder.delete(key)
        with pytest.raises(StorageError, match=f"{key}.*nothing there"):
            folder.read(key)
    assert list((folder / "absent").subfolders()) == []
    assert folder.read("present") == b""


def test_a_folder_travels_to_another_process(folder: Folder) -> None:
    folder.write("key", b"x")
    assert pickle.loads(pickle.dumps(folder)).read("key") == b"x"  # noqa: S301


def test_an_uploaded_folder_can_be_read_file_by_file(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("a", "sub/b", "sub/.c"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    folder.upload(source, "to/here")
    found = {entry.key: (folder / "to/here").read(entry.key).decode() for entry in (folder / "to/here").list()}
    assert found == {name: name for name in ("a", "sub/b", "sub/.c")}


# --------------------------------------------------------------------------------------------------------- listing


@pytest.mark.parametrize("folder", [MOTO], indirect=True)
def test_a_listing_goes_on_after_a_thousand_objects(folder: Folder) -> None:
    names = [f"{number % 7}/{number:04}" for number in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: folder.write(name, b""), names))
    assert keys(folder) == sorted(names)


def test_a_listing_is_in_order_and_below_its_prefix(folder: Folder) -> None:
    names = ["b/x", "b", "a.c", "a/c", "a-b", "ä", "Z", "B/x"]
    if folder.local:
        names.remove("b")  # a disk has no file with the name of a folder
    for name in names:
        folder.write(name, b"")
    assert keys(folder) == sorted(names)
    assert keys(folder, "a") == ["a-b", "a.c", "a/c"]
    assert keys(folder, "a/") == ["a/c"]
    assert keys(folder, "c") == []


@pytest.mark.parametrize("folder", STORES, indirect=True)
def test_a_listing_leaves_out_folder_markers(folder: Folder) -> None:
    bucket, _, path = folder.path.partition("/")
    for marker in (f"{path}/", f"{path}/sub/"):
        folder.fs.call_s3("put_object", Bucket=bucket, Key=marker)
    folder.write("sub/key", b"")
    assert keys(folder) == ["sub/key"]


@pytest.mark.parametrize("folder", STORES, indirect=True)
def test_a_listing_leaves_out_a_sibling_with_a_longer_name(folder: Folder) -> None:
    Folder(f"{folder.uri}-2").write("other", b"")
    folder.write("key", b"")
    assert keys(folder) == ["key"]


def test_a_local_listing_leaves_out_unfinished_writes_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / f"{TEMPORARY}-1").write_bytes(b"half")
    os.mkfifo(tmp_path / "pipe")  # whoever reads it waits for ever
    folder = Folder(str(tmp_path))
    folder.write("sub/key", b"")
    (tmp_path / "sub" / f"{TEMPORARY}-2").write_bytes(b"half")
    assert keys(folder) == ["sub/key"]


def test_a_local_listing_follows_links_and_names_one_that_leads_nowhere(tmp_path: Path) -> None:
    real, folder = Folder(str(tmp_path / "real")), Folder(str(tmp_path / "links"))
    real.write("sub/key", b"x")
    Path(folder.path).mkdir()
    Path(folder.path, "folder").symlink_to(tmp_path / "real")
    Path(folder.path, "file").symlink_to(tmp_path / "real/sub/key")
    assert [(entry.key, entry.size) for entry in folder.list()] == [("file", 1), ("folder/sub/key", 1)]
    Path(folder.path, "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(StorageError, match="links/dangling: this link leads nowhere"):
        list(folder.list())


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(partly_closed: Path) -> None:
    with pytest.raises(StorageError, match=r"closed.*check the permissions"):
        list(Folder(str(partly_closed)).list())


# -------------------------------------------------------------------------------------------- whole or absent, once


def test_of_eight_writers_that_create_one_wins(folder: Folder) -> None:
    for attempt in range(5):
        one_of_eight_creates(folder, f"lease-{attempt}")
    assert len(keys(folder)) == 5


def test_a_local_reader_sees_the_old_or_the_new_content_and_nothing_between(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    versions = [bytes([65 + number]) * (200_000 + number) for number in range(12)]
    folder.write("key", versions[0])
    done, seen = threading.Event(), set()

    def rewrite() -> None:
        try:
            for number in range(120):
                folder.write("key", versions[number % len(versions)])
        finally:
            done.set()

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(rewrite)
        while not done.is_set():
            (entry,) = folder.list()
            assert entry.key == "key"
            assert entry.size in map(len, versions)
            seen.add(folder.read("key"))
        writer.result()
    assert seen <= set(versions)


def test_a_local_write_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(tmp_path))
    folder.write("key", b"old")

    def disk_full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(StorageError, match=r"key: .*No space left"):
        folder.write("key", b"new")
    assert folder.read("key") == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "key"]


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("folder", STORES, indirect=True)
def test_a_missing_bucket_is_an_error_of_every_operation_and_is_named(folder: Folder) -> None:
    missing = Folder("s3://there-is-none/run")
    for name, operation in every_operation(missing).items():
        with pytest.raises(StorageError) as caught:
            operation()
        assert "s3://there-is-none/run" in str(caught.value), name
        assert "there is no bucket 'there-is-none'; create it or correct the name" in str(caught.value), name
        assert os.environ["AWS_ENDPOINT_URL"] in str(caught.value), name


@pytest.mark.ceph
def test_a_wrong_secret_is_an_error_of_every_operation(ceph_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    for name, operation in every_operation(Folder(f"s3://{ceph_bucket}/run")).items():
        with pytest.raises(StorageError, match="access was refused") as caught:
            operation()
        assert f"s3://{ceph_bucket}/run" in str(caught.value), name
        assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(caught.value), name


def test_an_endpoint_where_nobody_listens_is_an_error_within_30_s(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens: the port is refused, and nobody else's
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        began = time.monotonic()
        with pytest.raises(StorageError, match=f"s3://{s3}/run/key.*{endpoint}.*Correct AWS_ENDPOINT_URL"):
            Folder(f"s3://{s3}/run").read_if_present("key")
        assert time.monotonic() - began < 30


def test_a_store_that_accepts_and_never_answers_is_an_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `Expect: 100-continue` a PUT would wait for ever: no timeout runs before the store's permission to go on."""
    monkeypatch.setattr(retries, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(retries, "ATTEMPTS", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        folder = Folder(f"s3://{s3}/run")
        for operation in (folder.write, folder.create):
            errors: list[StorageError] = []

            def attempt(operation: Callable[..., object] = operation, errors: list[StorageError] = errors) -> None:
                try:
                    operation("key", b"x")
                except StorageError as error:
                    errors.append(error)

            thread = threading.Thread(target=attempt, daemon=True)  # so that even a PUT that hangs ends the test
            thread.start()
            thread.join(timeout=20)
            assert "timeout" in str(errors)


def test_a_missing_local_folder_is_an_error_of_list(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"{tmp_path}/absent: there is nothing there"):
        list(Folder(str(tmp_path / "absent")).list())


def test_a_file_where_a_local_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = Folder(str(tmp_path / "file"))
    for operation in (lambda: folder.write("key", b""), lambda: folder.create("key", b""), lambda: list(folder.list())):
        with pytest.raises(StorageError, match=str(tmp_path / "file")):
            operation()


@pytest.mark.parametrize("key", ["..", "../out", "a/../../out", "/etc/passwd"])
def test_a_key_never_leaves_a_local_folder(tmp_path: Path, key: str) -> None:
    folder = Folder(str(tmp_path / "data"))
    for operation in (lambda: folder.read(key), lambda: folder.write(key, b""), lambda: folder / key):
        with pytest.raises(UsageError, match="would leave its folder"):
            operation()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["gopher://host/folder", "s3x://bucket/folder"])
def test_an_unknown_kind_of_uri_is_a_usage_error(uri: str) -> None:
    with pytest.raises(UsageError, match=f"{uri}: no filesystem for this kind of URI"):
        Folder(uri)


def test_a_uri_that_names_no_folder_is_not_taken_for_the_current_one() -> None:
    with pytest.raises(UsageError, match="s3://bucket/folder"):
        Folder("s3://")
    assert Folder("/").path == "/"


# -------------------------------------------------------------------------------------------------- relative paths


def test_a_relative_path_is_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Folder("data").write("key", b"x")
    assert (tmp_path / "data/key").read_bytes() == b"x"
    assert absolute_uri("data") == str(tmp_path / "data")
    monkeypatch.delenv("REPSEP_HOME")
    assert home() == tmp_path / ".repsep"


def test_under_a_ray_job_a_relative_path_is_relative_to_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("REPSEP_HOME", str(tmp_path / "kept"))
    assert absolute_uri("data") == str(tmp_path / "kept/data")
    monkeypatch.delenv("REPSEP_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_uri("data") == str(tmp_path / ".repsep/data")


@pytest.mark.parametrize("uri", ["/data", "s3://bucket/data", "file:///data"])
def test_an_absolute_uri_stays_as_it_is(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert absolute_uri(uri) == uri


# --------------------------------------------------------------------------------------------------------- pyarrow


@pytest.mark.parametrize("folder", STORES, indirect=True)
def test_pyarrow_finds_the_same_store_by_the_same_variables(folder: Folder) -> None:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder.uri_of("by-arrow"))
    with filesystem.open_output_stream(path) as stream:
        stream.write(b"arrow")
    assert folder.read("by-arrow") == b"arrow"
    folder.write("by-us", b"ours")
    with filesystem.open_input_stream(f"{folder.path}/by-us") as stream:
        assert stream.read() == b"ours"
    assert keys(folder) == ["by-arrow", "by-us"]
