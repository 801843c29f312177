"""A Ray cluster of raylets on this machine that can be killed one by one, as machines are switched off."""

from __future__ import annotations

import http.client
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ports import free_ports
from tests.processes import descendants, kill_tree

ROOT, BIN = Path(__file__).parents[1], Path(sys.executable).parent
PATIENCE_S = 420
SETUP = {
    "OMP_WAIT_POLICY": "passive",
    "OMP_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",  # not 5 s: a proof that waits less
    "RAY_health_check_period_ms": "500",  # a raylet that is gone is found out within 2 s, not 15
    "RAY_health_check_failure_threshold": "4",
    "PYTHONPATH": str(ROOT),
}


class Cluster:
    """`ray start --head` with one raylet, and further raylets that play other machines. Ended by their ids."""

    def __init__(self, *cpus: float, environment: dict[str, str]) -> None:
        self.environment = environment
        self.head, self.others = self._head(cpus[0]), []  # type: ignore[var-annotated]
        for number in cpus[1:]:
            self.add(number)

    def _head(self, cpus: float) -> subprocess.Popen[bytes]:
        gcs, dashboard = free_ports(2)
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's name must be short
        self.address = f"{own_address()}:{gcs}"
        options = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={self.folder}"]
        process = self._start("--head", f"--num-cpus={cpus:g}", *options)
        self.jobs = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        wait_for(lambda: answers(dashboard) and len(self._alive()) == 1, process, "the head")
        return process

    def add(self, cpus: float) -> subprocess.Popen[bytes]:
        """One more raylet; waits until it is a node."""
        before = self._alive()  # one that was killed a moment ago may be among them
        process = self._start(f"--address={self.address}", f"--num-cpus={cpus:g}")
        self.others.append(process)
        wait_for(lambda: bool(self._alive() - before), process, "a further node")
        return process

    def kill_last(self) -> None:
        """SIGKILL the raylet that came last and all that ran there, as a machine that is switched off."""
        kill_tree(self.others[-1].pid)
        self.others.pop().wait()

    def whole(self, nodes: int) -> bool:
        """Whether all that was started still runs."""
        return len(self.others) + 1 == nodes and all(p.poll() is None for p in (self.head, *self.others))

    def workers(self) -> list[int]:
        """Process ids of the training workers, on all nodes."""
        return self.processes("ray::RayTrainWorker")

    def processes(self, name: str) -> list[int]:
        """Process ids of all whose command line has this in it, on all nodes."""
        roots = [self.head.pid, *(other.pid for other in self.others)]
        return [pid for root in roots for pid, command in descendants(root).items() if name in command]

    def wait_until_idle(self) -> None:
        """Until the workers of a driver that was killed are gone too."""
        wait_for(lambda: not self.workers(), self.head, "an idle cluster")

    def raylet(self) -> int:
        """Process id of the head's raylet."""
        return next(pid for pid, command in descendants(self.head.pid).items() if "/raylet/raylet " in command)

    def preempt_last(self, deadline_s: int) -> None:
        """Tell the cluster that the node that came last will be taken away."""
        node = next(each.node_id.hex() for each in self._nodes() if not each.is_head_node)
        what = ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot machine"]
        done = self._ray(
            "drain-node", "--address", self.address, *what, "--deadline-remaining-seconds", str(deadline_s)
        )
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        for process in (*self.others, self.head):
            kill_tree(process.pid)
            process.wait()
        self.others = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments]
        # NOTE without the address Ray's own actors ask whichever cluster of this machine they find.
        environment = self.environment | {"RAY_ADDRESS": self.address}
        with open(f"{self.folder}/start.log", "ab") as log:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = self.environment | self.jobs
        return subprocess.run([str(BIN / "ray"), *arguments], env=environment, capture_output=True, text=True)

    def _nodes(self) -> list[Any]:
        """What the head knows of the nodes that are alive."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        return [node for node in GcsClient(address=self.address).get_all_node_info().values() if node.state == 0]

    def _alive(self) -> set[str]:
        return {node.node_id.hex() for node in self._nodes()}


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], what: str, log: Path | None = None
) -> None:
    """Poll until the condition holds; RuntimeError if the process ends before, or after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        said = f"\n{log.read_text(errors='replace')[-3000:]}" if log else ""
        if process.poll() is not None:
            raise RuntimeError(f"it ended ({process.returncode}) before {what} was there{said}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} was not there after {PATIENCE_S} s{said}")
        time.sleep(0.05)


def own_address() -> str:
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())  # type: ignore[no-untyped-call]


def answers(port: int) -> bool:
    """Whether an HTTP server there says anything at all."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/api/version")
        return connection.getresponse().status > 0
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
