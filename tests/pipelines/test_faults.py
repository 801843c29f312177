"""Claims about `Folder` behind the fault proxy: what passes is survived, what does not is said, and nothing is lost."""

import hashlib
import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow.fs
import pytest
import s3fs

from pipelines import retries
from pipelines.errors import StorageError
from pipelines.storage import Folder
from tests.conftest import one_of_eight_creates
from tests.fault_proxy import KINDS, ONLY_GET, FaultProxy

DATA = os.urandom(50_000)
CEPH = pytest.param("ceph", marks=pytest.mark.ceph)
UNCHECKED_BY_MOTO = "flip_upload"
OPERATIONS: dict[str, Callable[[Folder], object]] = {
    "read": lambda folder: folder.read("key"),
    "read_as_listed": lambda folder: folder.read("key", etag=hashlib.md5(DATA).hexdigest(), size=len(DATA)),
    "sha256": lambda folder: folder.sha256("key"),
    "open": lambda folder: folder.open("key").read(),
    "write": lambda folder: folder.write("new", DATA),
    "create": lambda folder: folder.create("new", DATA),
    "create_over": lambda folder: folder.create("key", b"other"),
    "delete": lambda folder: folder.delete("other"),
    "size_of": lambda folder: folder.size_of("key"),
    "list": lambda folder: list(folder.list()),
    "subfolders": lambda folder: list(folder.subfolders()),
}
READS = ("read", "read_as_listed", "sha256", "open")
WRITES = ("write", "create")


def can_suffer(operation: str, kind: str) -> bool:
    """A flipped bit counts only where bytes are compared."""
    if kind == "flip":
        return operation in ("read", "read_as_listed")
    return operation in (*READS, "list") if kind in ONLY_GET else kind != UNCHECKED_BY_MOTO


@pytest.fixture(scope="module")
def moto_proxy(moto_server: str) -> Iterator[FaultProxy]:
    with FaultProxy(moto_server, drip=0.02) as proxy:
        yield proxy


@pytest.fixture
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between this process and moto, or Ceph by indirect parameter; its bucket is `bucket`."""
    if getattr(request, "param", "moto") == "moto":
        proxy, bucket = request.getfixturevalue("moto_proxy"), request.getfixturevalue("s3")
        proxy.arm()
        proxy.rate(0)
        yield enter(proxy, bucket, monkeypatch)
    else:
        bucket = request.getfixturevalue("ceph_bucket")
        with FaultProxy(os.environ["AWS_ENDPOINT_URL"], drip=0.02) as proxy:
            yield enter(proxy, bucket, monkeypatch)


def enter(proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    folder = Folder(f"s3://{bucket}/data")
    folder.write("key", DATA)
    folder.write("other", b"x")
    folder.write("sub/key", b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setenv("TEST_BUCKET", bucket)
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    return proxy


@pytest.fixture
def folder(proxy: FaultProxy) -> Folder:
    """A folder with `key`, `other` and `sub/key`, seen through the proxy."""
    return Folder(f"s3://{os.environ['TEST_BUCKET']}/data")


def lose_patience_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is silent or drips: half a minute is long for a test."""
    monkeypatch.setattr(retries, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(retries, "LISTING_SECONDS", 0.5)


def injected(proxy: FaultProxy) -> dict[str, int]:
    return {kind: count for kind, count in proxy.counts().items() if kind != "requests"}


# ------------------------------------------------------------------------------------------------ one kind at a time


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != UNCHECKED_BY_MOTO])
def test_every_operation_survives_a_fault(
    folder: Folder, proxy: FaultProxy, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in ("silence", "drip"):
        lose_patience_soon(monkeypatch)
    for name in [name for name in OPERATIONS if can_suffer(name, kind)]:
        expected = OPERATIONS[name](folder)
        folder.delete("new")
        before = injected(proxy).get(kind, 0)
        proxy.arm(kind)
        assert OPERATIONS[name](folder) == expected, name
        assert injected(proxy)[kind] == before + 1, name
        assert folder.read("key") == DATA, name
        if name in WRITES:
            assert folder.read("new") == DATA, name
            folder.delete("new")


@pytest.mark.parametrize("proxy", [CEPH], indirect=True)
def test_a_bit_that_differs_on_the_way_to_the_store_is_noticed_there_and_sent_again(
    folder: Folder, proxy: FaultProxy
) -> None:
    for key, operation in (("written", folder.write), ("created", folder.create)):
        proxy.arm("flip_upload", "flip_upload")
        operation(key, DATA)
        assert folder.read(key) == DATA
    assert injected(proxy) == {"flip_upload": 4}


def test_bits_that_differ_in_every_read_are_an_error(folder: Folder, proxy: FaultProxy) -> None:
    proxy.arm(*["flip"] * retries.ATTEMPTS)
    with pytest.raises(StorageError, match=r"data/key: read 8 times, and other bytes came every time"):
        folder.read("key")


def test_a_body_that_drips_is_cut_by_a_limit_that_its_size_sets(
    folder: Folder, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_patience_soon(monkeypatch)
    monkeypatch.setattr(retries, "SLOWEST", len(DATA))  # a second more
    proxy.arm("drip")
    began = time.monotonic()
    assert folder.read("key") == DATA
    assert retries.seconds_for(len(DATA)) == 1.5
    assert 1.5 <= time.monotonic() - began < 10


def test_a_store_that_never_recovers_is_an_error_that_says_what_was_met(folder: Folder, proxy: FaultProxy) -> None:
    before = proxy.counts()["requests"]
    proxy.arm(*["slowdown"] * 5, *["internal"] * 50)
    with pytest.raises(StorageError) as caught:
        folder.write("key", DATA)
    assert proxy.counts()["requests"] == before + retries.ATTEMPTS
    for part in (
        "data/key: every one of 8 attempts failed",
        "5 x 503 SlowDown",
        "3 x 500 InternalError",
        proxy.endpoint,
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("key", ["absent", "key/in/a/bucket/that/is/missing"])
def test_what_is_not_there_is_asked_for_once(folder: Folder, proxy: FaultProxy, key: str) -> None:
    elsewhere = folder if key == "absent" else Folder("s3://there-is-none/data")
    folder.read("key")  # the client is ready
    before = proxy.counts()["requests"]
    with pytest.raises(StorageError, match=r"nothing there|no bucket"):
        elsewhere.read(key)
    assert proxy.counts()["requests"] == before + 1


@pytest.mark.parametrize("proxy", [CEPH], indirect=True)
def test_what_is_forbidden_is_asked_for_once(
    folder: Folder, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    forbidden = Folder(folder.uri)
    for name in ("read", "write", "create", "list"):
        before = proxy.counts()["requests"]
        with pytest.raises(StorageError, match="access was refused"):
            OPERATIONS[name](forbidden)
        assert proxy.counts()["requests"] == before + 1


def test_a_read_without_faults_is_one_request_and_so_is_a_write(folder: Folder, proxy: FaultProxy) -> None:
    (entry,) = [entry for entry in folder.list() if entry.key == "key"]
    for operation in (
        lambda: folder.read("key"),
        lambda: folder.read("key", etag=entry.etag, size=entry.size),
        lambda: folder.write("key", DATA),
        lambda: folder.create("new", DATA),
    ):
        before = proxy.counts()["requests"]
        operation()
        assert proxy.counts()["requests"] == before + 1


def test_a_folder_that_travelled_survives_as_well(folder: Folder, proxy: FaultProxy) -> None:
    sent = pickle.dumps(folder)
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.arm("slowdown", "cut", "reset", "flip", "internal")
    assert pickle.loads(sent).read("key") == DATA  # noqa: S301


# ------------------------------------------------------------------------------------------------------ all together


@pytest.mark.parametrize("proxy", ["moto", CEPH], indirect=True)
def test_of_eight_writers_whose_answers_get_lost_one_wins(folder: Folder, proxy: FaultProxy) -> None:
    for attempt in range(6):
        proxy.arm("lost", "slowdown", "lost", "reset", "lost", "internal", "lost", "lost")
        one_of_eight_creates(folder, f"lease-{attempt}")


def lost(folder: Folder, objects: int) -> list[str]:
    """Keys of objects of 50 KB that are not there after they were written, or are not what they were."""
    contents = {f"many/{number}": os.urandom(50_000) for number in range(objects)}

    def intact(key: str) -> bool:
        try:
            folder.write(key, contents[key])
            return folder.read(key) == contents[key]
        except StorageError as error:
            print(error)
            return False

    with ThreadPoolExecutor(16) as pool:
        kept = dict(zip(contents, pool.map(intact, contents), strict=True))
    assert [entry.key for entry in folder.list("many/")] == sorted(contents)
    return [key for key, is_kept in kept.items() if not is_kept]


def test_of_60_objects_none_is_lost_when_three_requests_of_ten_fail(
    moto_server: str, s3: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [kind for kind in KINDS if kind != UNCHECKED_BY_MOTO]
    with FaultProxy(moto_server, rate=0.3, seed=1, kinds=kinds) as proxy:
        enter(proxy, s3, monkeypatch)
        lose_patience_soon(monkeypatch)
        assert lost(Folder(f"s3://{s3}/data"), 60) == []
        assert sum(injected(proxy).values()) >= 20


@pytest.mark.slow
@pytest.mark.ceph
def test_of_500_objects_none_is_lost_when_one_request_of_ten_fails(
    ceph_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"], rate=0.1, seed=1) as proxy:
        enter(proxy, ceph_bucket, monkeypatch)
        monkeypatch.setattr(retries, "ANSWER_SECONDS", 3.0)
        assert lost(Folder(f"s3://{ceph_bucket}/data"), 500) == []
        print(proxy.counts())
        assert set(injected(proxy)) == set(KINDS)
        assert sum(injected(proxy).values()) >= 60


# --------------------------------------------------------------------------------------------------------- the proxy


@pytest.mark.parametrize("proxy", ["moto", CEPH], indirect=True)
def test_the_proxy_lets_another_client_through_with_its_signature_and_its_expect(
    folder: Folder, proxy: FaultProxy
) -> None:
    before = proxy.counts()["requests"]
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder.uri_of("by-arrow"))
    with filesystem.open_output_stream(path) as stream:
        stream.write(DATA * 200)  # in parts
    assert folder.read("by-arrow") == DATA * 200
    assert proxy.counts()["requests"] > before + 2


def test_two_proxies_of_one_seed_inject_the_same(moto_server: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for _ in range(2):
        with FaultProxy(moto_server, rate=0.5, seed=8, kinds=["slowdown", "internal", "reset"]) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            monkeypatch.setattr(retries, "FIRST_PAUSE", 0.001)
            s3fs.S3FileSystem.clear_instance_cache()
            for number in range(10):
                Folder(f"s3://{s3}/data").write(f"{number}", b"")
            seen.append(proxy.counts())
    assert seen[0] == seen[1]
    assert len(seen[0]) == 4
