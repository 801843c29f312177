"""Stores and data that several tests share.

    scenes         a small generated data set in a local folder
    s3             a fresh bucket on moto, an S3 server in memory that starts within seconds and checks no keys
    ceph_bucket    a fresh bucket on Ceph RGW, a real S3 store (infra/dev/ceph-rgw.sh); skipped where there is none
    partly_closed  a local folder with one that may not be read

Both buckets come with the AWS variables that lead there; `moto_server` and `ceph` are the stores themselves.
"""

import errno
import http.client
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.ports import free_ports

# Before anything imports torch or Ray, and inherited by every process that a test starts: OpenMP's threads sleep when
# they have nothing to do instead of taking the core from the other worker, and no test calls home.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

CEPH_RGW = Path(__file__).parents[1] / "infra/dev/ceph-rgw.sh"
# What would lead a test to someone's own account or store.
FOREIGN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE")


class Store(NamedTuple):
    """An S3 endpoint and the keys of a user who may do everything there."""

    endpoint: str
    access_key: str
    secret_key: str


@pytest.fixture(scope="session", autouse=True)
def repsep_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """REPSEP_HOME in a temporary folder: no test writes into the user's own."""
    home = tmp_path_factory.mktemp("repsep-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPSEP_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated data set, small: 24 training, 8 validation and 6 unlabelled images. Do not write into it."""
    from pipelines.scenes import write_scenes

    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, train=24, val=8, unlabelled=6, size=(96, 128))
    return folder


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a moto server. It accepts any keys and, wrongly, any secret."""
    port, log = free_ports(1)[0], tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 90
        while not answers(port):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"moto's server did not start (exit status {server.poll()}):\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()  # it holds nothing that could be lost
        server.wait()


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A Ceph RGW of this session's own."""
    if not shutil.which("radosgw"):
        pytest.skip(f"radosgw is not installed; run {CEPH_RGW} install")
    folder = tmp_path_factory.mktemp("ceph")
    rgw_port, mon_port = free_ports(2)
    environment = os.environ | {"RGW_PORT": str(rgw_port), "MON_PORT": str(mon_port)}
    environment |= {"S3_ACCESS_KEY": "test", "S3_SECRET_KEY": secrets.token_hex(16)}

    def run(verb: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(CEPH_RGW), verb, str(folder)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    try:
        started = run("start")
        assert started.returncode == 0, started.stderr
        ready, endpoint, access_key, secret_key = started.stdout.splitlines()[-1].split()
        assert ready == "ready"
        yield Store(endpoint, access_key, secret_key)
    finally:
        stopped = run("stop")
        assert stopped.returncode == 0, stopped.stderr


@pytest.fixture
def s3(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a fresh bucket on moto, with the AWS variables set for it."""
    use(Store(moto_server, "test", "test"), monkeypatch)
    yield make_bucket()
    forget_clients()


@pytest.fixture
def ceph_bucket(ceph: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a fresh bucket on Ceph RGW, with the AWS variables set for it."""
    use(ceph, monkeypatch)
    yield make_bucket()
    forget_clients()


@pytest.fixture
def partly_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `a/key` and `closed/key`, of which `closed` may not be listed."""
    for name in ("a", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_bytes(b"")
    scandir = os.scandir

    def guarded(path: str) -> Any:  # root may read everything, whatever the mode says
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    return tmp_path


def one_of_eight_creates(folder: Any, key: str) -> None:
    """Of eight writers that create the object of a `Folder` at once, exactly one wins, and its content is there."""
    start = threading.Barrier(8)

    def create(writer: int) -> bool:
        start.wait(timeout=30)
        return bool(folder.create(key, b"writer %d" % writer))

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert won.count(True) == 1
    assert folder.read(key) == b"writer %d" % won.index(True)


def use(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point every S3 client that this process or a child of it creates at the store."""
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": store.endpoint,
        "AWS_ACCESS_KEY_ID": store.access_key,
        "AWS_SECRET_ACCESS_KEY": store.secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        # Otherwise pyarrow sends a checksum behind the body, which RGW answers with 411 Length Required.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    forget_clients()


def make_bucket() -> str:
    """With the client that the test will use: to make one takes longer than most tests."""
    from pipelines.storage import Folder

    name = f"test-{secrets.token_hex(6)}"
    Folder(f"s3://{name}").fs.mkdir(name)
    return name


def forget_clients() -> None:
    """s3fs keeps its instances by their arguments; endpoint and keys from the environment are not among those."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def answers(port: int, path: str = "/moto-api/") -> bool:
    """Whether an HTTP server there answers. By hand, so that no proxy of the environment comes between."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
