"""The main job on one machine: a local Ray, an S3 endpoint on loopback, MLflow on sqlite, all under one folder.

The endpoint is moto's server, which keeps objects in memory; the bucket is copied to a folder at the end and back at
the start, so that a second demo finds what the first one left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import load_recipe
from pipelines.errors import RepsepError, UsageError
from pipelines.prepare import generated_scenes
from pipelines.progress import say
from pipelines.stage import Receipt
from pipelines.storage import Folder
from pipelines.tracking import tracking_uri
from pipelines.workflow import run_workflow

BUCKET = "repsep-demo"
START_TIMEOUT_S = 60.0


@dataclass
class Demo:
    """A running demo: receipts come as stages are done; `page` is known at the end."""

    receipts: Iterator[Receipt]
    bucket_folder: Path
    tracking_uri: str
    page: str = ""


@contextlib.contextmanager
def run_demo(data: str | None, folder: str, settings: tuple[str, ...]) -> Iterator[Demo]:
    """Start the endpoint, yield the workflow's receipts, stop the endpoint. Raises UsageError for a missing folder."""
    home = Path(folder).absolute()
    if data is not None and not Path(data).is_dir():
        raise UsageError(f"DATA={data} is not a folder; it holds images/, masks/ and classes.json")
    home.mkdir(parents=True, exist_ok=True)
    environment = {"REPSEP_HOME": str(home), "RAY_ADDRESS": "local", "MLFLOW_TRACKING_URI": ""}
    bucket_folder = home / "s3" / BUCKET
    with _environment(environment), loopback_s3(home / "s3"):
        source = Path(data).resolve() if data is not None else generated_scenes(0)
        name = source.name if data is not None else "scenes"
        # Two folders of one name must not share a bucket.
        place = f"{name}-{hashlib.sha256(str(source).encode()).hexdigest()[:6]}" if data is not None else name
        images = (source / "unlabelled", source / "images" / "val", source / "images")
        _fill_bucket(next((f for f in images if f.is_dir()), source), f"s3://{BUCKET}/{place}/images")
        given = {
            "workspace": str(home / "workspace" / place),
            "prepare.source": str(source),
            "register.name": name,
            "segment.source": f"s3://{BUCKET}/{place}/images",
            "segment.target": f"s3://{BUCKET}/{place}/labelled",
        }
        recipe = load_recipe("demo", [*(f"{key}={json.dumps(value)}" for key, value in given.items()), *settings])
        demo = Demo(iter(()), bucket_folder, tracking_uri(recipe.tracking))

        def receipts() -> Iterator[Receipt]:
            for receipt in run_workflow(recipe, "demo"):
                demo.page = receipt.results.get("page", demo.page)
                yield receipt

        demo.receipts = receipts()
        yield demo


@contextlib.contextmanager
def loopback_s3(folder: Path) -> Iterator[str]:
    """An S3 endpoint of moto's server on a free port of 127.0.0.1, with the AWS variables set to it; yields its URL.

    Buckets are the subfolders of `folder`: read at the start, written back at the end.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import moto  # noqa: F401
    except ImportError as error:
        raise UsageError("the demo's S3 endpoint needs moto; install repsep with its dev extra (make setup)") from error
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            start_new_session=True,  # Ctrl-C is for us: the bucket is kept before the endpoint ends
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    keys = {
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    unset = {"AWS_ENDPOINT_URL_S3": "", "AWS_PROFILE": "", "AWS_SESSION_TOKEN": ""}
    try:
        with _environment({"AWS_ENDPOINT_URL": endpoint} | keys | unset):
            _wait(server, endpoint, folder / "server.log")
            _restore(folder)
            try:
                yield endpoint
            finally:
                _keep(folder)
    finally:
        server.terminate()
        server.wait()


def _wait(server: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if server.poll() is not None or time.monotonic() > deadline:
            raise RepsepError(f"the S3 endpoint on {endpoint} did not start; see {log}")
        try:
            urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)


def _restore(folder: Path) -> None:
    root = Folder(f"s3://{BUCKET}")
    root.fs.mkdir(BUCKET)
    for bucket in (p for p in folder.iterdir() if p.is_dir()):
        root.upload(bucket)


def _keep(folder: Path) -> None:
    kept = Folder(str(folder / BUCKET))
    there = {e.key for e in Folder(f"s3://{BUCKET}").list()}
    if kept.fs.exists(kept.path):
        for entry in list(kept.list()):
            if entry.key not in there:
                kept.delete(entry.key)
    bucket = Folder(f"s3://{BUCKET}")
    for entry in bucket.list():
        kept.write(entry.key, bucket.read(entry.key))


def _fill_bucket(images: Path, uri: str) -> None:
    target = Folder(uri)
    there = {entry.key for entry in target.list()}
    missing = [p for p in sorted(images.rglob("*")) if p.is_file() and p.relative_to(images).as_posix() not in there]
    for path in missing:
        target.write(path.relative_to(images).as_posix(), path.read_bytes())
    say(f"bucket: {uri} holds {len(there) + len(missing)} images")


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables (an empty value unsets) for the time of the block."""
    before = {name: os.environ.get(name) for name in values}
    try:
        for name, value in values.items():
            if value:
                os.environ[name] = value
            else:
                os.environ.pop(name, None)
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old
