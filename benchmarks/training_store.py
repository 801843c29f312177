"""A store that refuses, or takes its time over, what is written below a `checkpoint_...` folder, and nothing else.

with CheckpointProxy(endpoint) as store: ...      then store.rate(1.0) refuses all, store.slow(2.0) delays each PUT
"""

from __future__ import annotations

import asyncio
import re
import urllib.parse
from typing import Any

from tests import fault_proxy
from tests.fault_proxy import FaultProxy, Message, Proxy


class CheckpointFaults(Proxy):
    """The fault proxy, deaf to all but checkpoints."""

    seconds = 0.0

    def _choose(self, request: Message) -> str | None:
        return super()._choose(request) if writes_a_checkpoint(request) else None

    async def _ask(self, request: Message, store: Any) -> Any:
        if writes_a_checkpoint(request):
            await asyncio.sleep(self.seconds)
        return await super()._ask(request, store)

    def _control(self, path: str) -> Message:
        verb, _, argument = path.removeprefix("/__").partition("/")
        if verb == "slow":
            self.seconds = float(argument)
        return super()._control(path)


def writes_a_checkpoint(request: Message) -> bool:
    method, target = request.first.split()[:2]
    return method in ("PUT", "POST") and re.search(r"/checkpoint_\d", urllib.parse.unquote(target)) is not None


class CheckpointProxy(FaultProxy):
    """It in a process of its own."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream, kinds=["internal"])
        self._command[self._command.index("tests.fault_proxy")] = "benchmarks.training_store"

    def __enter__(self) -> CheckpointProxy:
        super().__enter__()
        return self

    def slow(self, seconds: float) -> None:
        """How long each PUT of a checkpoint waits before the store gets it."""
        self._control(f"slow/{seconds}")


if __name__ == "__main__":
    fault_proxy.Proxy = CheckpointFaults  # type: ignore[misc]
    fault_proxy.main()
