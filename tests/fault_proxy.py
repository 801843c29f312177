"""An HTTP proxy between S3 clients and a store that injects faults, in a process of its own.

    python -m tests.fault_proxy --upstream http://127.0.0.1:17480 --rate 0.1 --seed 1

prints `ready http://127.0.0.1:PORT` and serves until it is ended; AWS_ENDPOINT_URL then names it instead of the store.
The Host header passes as it came, so signatures hold. A fault hits a request with probability `rate`, each of the
kinds that the request can suffer equally often:

    slowdown     503 SlowDown, the store is not asked
    internal     500 InternalError, the store is not asked
    reset        the connection is reset, the store is not asked
    lost         the store does it, then the connection is reset: its answer is lost
    silence      no answer, until the client hangs up or `--silence` seconds have passed; the store is not asked
    cut          the connection is reset in the middle of the answer's body (GET)
    drip         a byte of the answer's body each `--drip` seconds (GET)
    flip         one bit of the answer's body differs (GET of an object)
    flip_upload  one bit of the request's body differs (PUT); a store that checks what it gets refuses it, moto does not

From a script: `with FaultProxy(endpoint, rate=0.1) as proxy: ...`, then `proxy.endpoint`, `proxy.counts()`,
`proxy.rate(0.5)`, and `proxy.arm("cut", "cut")` for the next two requests that can suffer it. Over HTTP the same are
GET /__counts, /__rate/0.5 and /__arm/cut,cut.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
import urllib.parse
import urllib.request
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("slowdown", "internal", "reset", "lost", "silence", "cut", "drip", "flip", "flip_upload")
ONLY_GET = ("cut", "drip", "flip")
LONGEST_HEAD = 256 * 1024
ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{0}</Code><Message>{0} by the fault proxy</Message></Error>'


@dataclass
class Message:
    """A request or an answer: first line, headers in their order, body as it was sent, chunk marks included."""

    first: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> str:
        return next((value for each, value in self.headers if each.lower() == name), "")

    def without(self, *names: str) -> Message:
        return Message(self.first, [each for each in self.headers if each[0].lower() not in names], self.body)

    @property
    def chunked(self) -> bool:
        return "chunked" in self.header("transfer-encoding").lower()

    def head(self) -> bytes:
        lines = [self.first, *(f"{name}: {value}" for name, value in self.headers), "", ""]
        return "\r\n".join(lines).encode("latin-1")


class Proxy:
    """What `--help` says. All connections run in one event loop, so nothing here needs a lock."""

    def __init__(self, upstream: str, *, rate: float, seed: int, kinds: Iterable[str], silence: float, drip: float):
        parts = urllib.parse.urlsplit(upstream)
        assert parts.scheme == "http", f"{upstream}: only http"
        assert parts.hostname
        self._upstream = (parts.hostname, parts.port or 80)
        self._rate, self._random, self._kinds = rate, random.Random(seed), tuple(kinds)
        self._silence, self._drip = silence, drip
        self._armed: deque[str] = deque()
        self._counts = Counter(requests=0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection, request by request."""
        store: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while (request := await read_request(reader, writer)) is not None:
                if request.first.split()[1].startswith("/__"):
                    await send(writer, self._control(request.first.split()[1]))
                    continue
                self._counts["requests"] += 1
                kind = self._choose(request)
                if kind == "flip_upload":
                    request.body = flipped(request.body, self._random)
                elif kind in ("slowdown", "internal"):
                    await send(writer, refusal(kind))
                    continue
                elif kind == "reset":
                    return reset(writer)
                elif kind == "silence":
                    # A client that hangs up ends the wait; one that sends more is not listened to.
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(), self._silence)
                    return reset(writer)
                answer, store = await self._ask(request, store)
                if not await self._pass_on(writer, reader, answer, kind):
                    return reset(writer)
                if closes(request) or closes(answer):
                    return None
        except (ConnectionError, asyncio.IncompleteReadError):
            return None  # the client has gone, or the store, which the client then sees
        finally:
            for each in (writer, *(store[1:] if store else ())):
                each.close()
        return None

    def _choose(self, request: Message) -> str | None:
        kinds = suffered_by(request)
        if self._armed:
            kind = self._armed.popleft() if self._armed[0] in kinds else None
        else:
            kinds = [each for each in kinds if each in self._kinds]
            kind = self._random.choice(kinds) if kinds and self._random.random() < self._rate else None
        if kind:
            self._counts[kind] += 1
        return kind

    async def _ask(self, request: Message, store: Any) -> tuple[Message, Any]:
        """The store's answer, over the connection that this client's earlier requests used if it is still open."""
        for fresh in (False, True):
            if fresh or store is None:
                store = await asyncio.open_connection(*self._upstream, limit=LONGEST_HEAD)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                store[1].write(request.head() + request.body)
                await store[1].drain()
                answer = await read_answer(store[0], request.first.split()[0])
                if closes(answer):
                    store[1].close()
                    return answer, None
                return answer, store
        raise ConnectionResetError("the store does not answer")

    async def _pass_on(
        self, writer: asyncio.StreamWriter, reader: asyncio.StreamReader, answer: Message, kind: str | None
    ) -> bool:
        """Send the answer, with its fault; False where the connection is to be reset."""
        if kind == "lost":
            return False
        if kind == "cut":
            writer.write(answer.head() + answer.body[: len(answer.body) // 2])
            await writer.drain()
            return False
        if kind == "drip":
            writer.write(answer.head())
            for place in range(len(answer.body)):
                writer.write(answer.body[place : place + 1])
                await writer.drain()
                gone = asyncio.ensure_future(reader.read(1))
                done, _ = await asyncio.wait([gone], timeout=self._drip)
                if done:
                    return False
                gone.cancel()
            return True
        if kind == "flip" and answer.first.split()[1] in ("200", "206"):
            answer.body = flipped(answer.body, self._random)
        await send(writer, answer)
        return True

    def _control(self, path: str) -> Message:
        verb, _, argument = path.removeprefix("/__").partition("/")
        if verb == "arm":
            self._armed = deque(argument.split(",") if argument else [])
        elif verb == "rate":
            self._rate = float(argument)
        return answer_of("200 OK", json.dumps(dict(self._counts)), "application/json")


def suffered_by(request: Message) -> list[str]:
    """The kinds of fault that make sense for this request."""
    method, target = request.first.split()[:2]
    path, _, query = target.partition("?")
    is_object = len(path.strip("/").split("/")) > 1 and not any(
        each in query for each in ("list-type", "uploads", "uploadId", "location", "versioning")
    )
    kinds = list(KINDS)
    if method != "GET":
        kinds = [each for each in kinds if each not in ONLY_GET]
    if not is_object and "flip" in kinds:
        kinds.remove("flip")
    if method != "PUT" or not request.body or request.chunked:
        kinds.remove("flip_upload")
    return kinds


def flipped(body: bytes, chance: random.Random) -> bytes:
    """The body with one bit changed."""
    if not body:
        return body
    changed = bytearray(body)
    changed[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def refusal(kind: str) -> Message:
    """What a store says that has too much to do, or does not know what is wrong with it."""
    status, code = {
        "slowdown": ("503 Slow Down", "SlowDown"),
        "internal": ("500 Internal Server Error", "InternalError"),
    }[kind]
    return answer_of(status, ERROR.format(code), "application/xml")


def answer_of(status: str, body: str, kind: str) -> Message:
    data = body.encode()
    return Message(f"HTTP/1.1 {status}", [("Content-Type", kind), ("Content-Length", str(len(data)))], data)


def closes(message: Message) -> bool:
    """Whether its sender ends the connection with it. An answer of unknown length ends with the connection."""
    said = message.header("connection").lower()
    is_old = "HTTP/1.0" in message.first
    return said == "close" or (is_old and said != "keep-alive")


def reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with RST instead of FIN."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def send(writer: asyncio.StreamWriter, message: Message) -> None:
    writer.write(message.head() + message.body)
    await writer.drain()


async def read_head(reader: asyncio.StreamReader) -> Message:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")[:-4].split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return Message(first, [(name.strip(), value.strip()) for name, _, value in pairs])


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Message | None:
    """The next request of a connection, whole; None at its end. `Expect` is answered here and goes no further."""
    try:
        request = await read_head(reader)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    if request.header("expect").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request = request.without("expect")
    request.body = await read_body(reader, request)
    return request


async def read_answer(reader: asyncio.StreamReader, method: str) -> Message:
    answer = await read_head(reader)
    while (status := int(answer.first.split()[1])) < 200:
        answer = await read_head(reader)
    if method == "HEAD" or status in (204, 304):
        return answer
    if answer.chunked or answer.header("content-length"):
        answer.body = await read_body(reader, answer)
        return answer
    answer.body = await reader.read()
    answer = answer.without("connection")
    answer.headers.append(("Connection", "close"))
    return answer


async def read_body(reader: asyncio.StreamReader, message: Message) -> bytes:
    """The bytes after the head: of the length it says, or chunks with their marks and trailers."""
    if not message.chunked:
        return await reader.readexactly(int(message.header("content-length") or 0))
    pieces = []
    while True:
        mark = await reader.readuntil(b"\r\n")
        pieces.append(mark)
        if size := int(mark.split(b";")[0], 16):
            pieces.append(await reader.readexactly(size + 2))
            continue
        while True:
            trailer = await reader.readuntil(b"\r\n")
            pieces.append(trailer)
            if trailer == b"\r\n":
                return b"".join(pieces)


class FaultProxy:
    """The proxy in a process of its own, for a test or a script; ends with the `with`."""

    def __init__(
        self, upstream: str, *, rate: float = 0.0, seed: int = 0, kinds: Iterable[str] = KINDS, **options: float
    ) -> None:
        arguments = {"upstream": upstream, "rate": rate, "seed": seed, "kinds": ",".join(kinds), **options}
        self._command = [sys.executable, "-m", "tests.fault_proxy"]
        self._command += [f"--{name}={value}" for name, value in arguments.items()]

    def __enter__(self) -> FaultProxy:
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(self._command, cwd=root, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        ready = self._process.stdout.readline().split()
        assert ready[:1] == ["ready"], f"the fault proxy did not start (exit status {self._process.wait()})"
        self.endpoint = ready[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()

    def counts(self) -> dict[str, int]:
        """Requests seen, and faults injected by kind."""
        return self._control("counts")

    def arm(self, *kinds: str) -> None:
        """The next faults, one for each request that can suffer the first of them; no others until they are used up."""
        assert set(kinds) <= set(KINDS), kinds
        self._control("arm/" + ",".join(kinds))

    def rate(self, rate: float) -> None:
        """The share of requests that meet a fault from now on."""
        self._control(f"rate/{rate}")

    def _control(self, path: str) -> dict[str, int]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.endpoint}/__{path}", timeout=30) as answer:
            found: dict[str, int] = json.load(answer)
            return found


async def run(proxy: Proxy, host: str, port: int) -> None:
    server = await asyncio.start_server(proxy.serve, host, port, limit=LONGEST_HEAD)
    print(f"ready http://{host}:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True, help="the store's endpoint, http://HOST:PORT")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: one that is free")
    parser.add_argument("--rate", type=float, default=0.0, help="share of the requests that meet a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="which faults, with commas between")
    parser.add_argument("--silence", type=float, default=3600.0, help="seconds")
    parser.add_argument("--drip", type=float, default=0.5, help="seconds between two bytes")
    given = parser.parse_args()
    kinds = given.kinds.split(",") if given.kinds else []
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no such kinds: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    proxy = Proxy(given.upstream, rate=given.rate, seed=given.seed, kinds=kinds, silence=given.silence, drip=given.drip)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run(proxy, given.host, given.port))


if __name__ == "__main__":
    main()
