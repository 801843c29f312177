"""An S3 endpoint for a benchmark: the one given, or a Ceph RGW of its own, with the environment that goes with it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_ports

ROOT = Path(__file__).parents[1]
SETUP = {
    "OMP_WAIT_POLICY": "passive",
    "OMP_NUM_THREADS": "1",
    "RAY_ADDRESS": "local",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "PYTHONPATH": str(ROOT),
}


@contextmanager
def endpoint(given: str | None) -> Iterator[None]:
    """The AWS variables for the endpoint given, or for one of our own."""
    os.environ.update(SETUP)
    if given is not None:
        os.environ["AWS_ENDPOINT_URL"] = given
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ceph-") as folder:
        rgw, mon = map(str, free_ports(2))
        script, ports = ["bash", str(ROOT / "infra/dev/ceph-rgw.sh")], {"RGW_PORT": rgw, "MON_PORT": mon}
        started = subprocess.run(
            [*script, "start", folder], env=os.environ | ports, capture_output=True, text=True, check=True
        )
        _, url, key, secret = started.stdout.splitlines()[-1].split()
        os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
        try:
            yield
        finally:
            subprocess.run([*script, "stop", folder], env=os.environ | ports, capture_output=True, check=True)
