"""A page as a real browser has it: headless Chromium, spoken to by its DevTools protocol over a web socket.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

DEADLINE_S = 60
# What a page could do wrong without an error: pictures that are none, or more width than the window has.
LOOK = """({
    broken: [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.alt),
    images: document.images.length,
    overflow: document.documentElement.scrollWidth - window.innerWidth,
})"""


@dataclass
class Seen:
    """What the browser had to say of a page in a window of this width."""

    errors: list[str] = field(default_factory=list)
    """Exceptions, the console's errors, violations of the page's own security policy, dialogs."""
    requests: list[str] = field(default_factory=list)
    """What was asked for besides the page itself and data in it."""
    broken: list[str] = field(default_factory=list)
    images: int = 0
    overflow: int = 0


def look_at(page: Path, width: int) -> Seen:
    """Open a file. Skips where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if chromium is None:
        pytest.skip("there is no chromium")
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command += ["--no-first-run", f"--user-data-dir={profile}", "about:blank"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as browser:
            try:
                assert browser.stderr is not None
                found = (re.search(r"DevTools listening on (ws://\S+)", line) for line in browser.stderr)
                socket = next(match[1] for match in found if match)
                return asyncio.run(asyncio.wait_for(_visit(socket, page.as_uri(), width), DEADLINE_S))
            finally:
                browser.kill()


async def _visit(socket: str, uri: str, width: int) -> Seen:
    seen = Seen()
    async with aiohttp.ClientSession() as session, session.ws_connect(socket, max_msg_size=0) as devtools:
        last = 0

        async def call(method: str, in_page: str | None = None, **parameters: Any) -> dict[str, Any]:
            """Send a command; what happens before its answer is noted."""
            nonlocal last
            last += 1
            message: dict[str, Any] = {"id": last, "method": method, "params": parameters}
            await devtools.send_json(message | ({"sessionId": in_page} if in_page else {}))
            while (got := await devtools.receive_json()).get("id") != last:
                await note(got, in_page)
            assert "error" not in got, got
            return dict(got["result"])

        async def note(got: dict[str, Any], in_page: str | None) -> None:
            nonlocal loaded
            values = got.get("params", {})
            match got.get("method"):
                case "Runtime.exceptionThrown":
                    seen.errors.append(values["exceptionDetails"]["text"])
                case "Log.entryAdded" if values["entry"]["level"] == "error":
                    seen.errors.append(values["entry"]["text"])
                case "Page.javascriptDialogOpening":  # it would wait for ever
                    seen.errors.append(f"dialog: {values['message']}")
                    closing = {"id": -1, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                    await devtools.send_json(closing | {"sessionId": in_page})
                case "Network.requestWillBeSent":
                    asked = values["request"]["url"]
                    if asked != uri and not asked.startswith("data:"):
                        seen.requests.append(asked)
                case "Page.loadEventFired":
                    loaded = True

        loaded = False
        target = (await call("Target.createTarget", url="about:blank"))["targetId"]
        tab = (await call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await call(f"{domain}.enable", tab)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await call("Emulation.setDeviceMetricsOverride", tab, **size)
        await call("Page.navigate", tab, url=uri)
        while not loaded:
            await note(await devtools.receive_json(), tab)
        looked = (await call("Runtime.evaluate", tab, expression=LOOK, returnByValue=True))["result"]["value"]
    seen.broken, seen.images, seen.overflow = looked["broken"], looked["images"], looked["overflow"]
    return seen
