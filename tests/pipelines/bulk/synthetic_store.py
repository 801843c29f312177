"""An S3 store that only lists, keys that nobody has written; it counts, delays and refuses.

    python -m tests.pipelines.bulk.synthetic_store < keys.txt

serves a listing of these keys, prints its endpoint and stays until it is killed. An object's ETag is `etag_of` its key.
"""

from __future__ import annotations

import bisect
import sys
import threading
from collections.abc import Callable, Sequence
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

if TYPE_CHECKING:
    import pytest

Query = dict[str, str]
KEYS = {"AWS_ACCESS_KEY_ID": "synthetic", "AWS_SECRET_ACCESS_KEY": "synthetic", "AWS_REGION": "us-east-1"}


def etag_of(key: str) -> str:
    return blake2b(key.encode(), digest_size=16).hexdigest()


class SyntheticStore:
    """Answers list_objects_v2 for any bucket, in threads of its own, until it is closed."""

    def __init__(self, keys: Sequence[str], *, page: int = 1000) -> None:
        self.keys, self.page = sorted(keys, key=str.encode), page
        self.requests = 0
        self.refused: Callable[[Query], bool] = lambda _: False
        self.held: Callable[[Query], bool] = lambda _: False
        self.barrier = threading.Barrier(1)
        self.active = 0
        self.changed = threading.Condition()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """The AWS variables that lead here."""
        return KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.server_port}"}

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import s3fs

        for name, value in (self.environment | {"AWS_EC2_METADATA_DISABLED": "true"}).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    def refuse(self, which: Callable[[Query], bool]) -> None:
        """Answer these requests with 403."""
        self.refused = which

    def hold_back(self, count: int, which: Callable[[Query], bool]) -> None:
        """Answer the first `count` of these requests only when all of them are there."""
        self.barrier, self.held = threading.Barrier(count), which

    def wait_until_idle(self, seconds: float = 0.5) -> None:
        """Return when no request has come for so long."""
        with self.changed:
            while self.active or self.changed.wait(seconds):
                if self.active:
                    self.changed.wait(seconds)

    def close(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def __enter__(self) -> SyntheticStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def answer(self, query: Query) -> tuple[int, str]:
        """Status and body."""
        with self.changed:
            self.requests += 1
            self.active += 1
            self.changed.notify_all()
        try:
            if self.refused(query):
                return 403, "<Error><Code>AccessDenied</Code><Message>not for you</Message></Error>"
            if self.held(query) and self.barrier.n_waiting < self.barrier.parties:
                self.barrier.wait(60)
            return 200, self.listing(query)
        finally:
            with self.changed:
                self.active -= 1
                self.changed.notify_all()

    def listing(self, query: Query) -> str:
        """A page of keys, and of common prefixes if there is a delimiter."""
        prefix, token = query.get("prefix", ""), query.get("continuation-token")
        after = bytes.fromhex(token).decode() if token else query.get("start-after", "")
        at = max(self._index(prefix, bisect.bisect_left), self._index(after, bisect.bisect_right) if after else 0)
        items: list[str] = []
        while len(items) < self.page and at < len(self.keys) and self.keys[at].startswith(prefix):
            key = self.keys[at]
            folder, slash, _ = key[len(prefix) :].partition("/")
            if slash and "delimiter" in query:
                items.append(f"<CommonPrefixes><Prefix>{quote(prefix + folder + '/')}</Prefix></CommonPrefixes>")
                at = self._index(prefix + folder + "0", bisect.bisect_left)  # the character after the slash
                continue
            items.append(
                f"<Contents><Key>{quote(key)}</Key><LastModified>2026-11-22T10:00:00.000Z</LastModified>"
                f"<ETag>&quot;{etag_of(key)}&quot;</ETag><Size>{100_000 + len(key)}</Size>"
                "<StorageClass>STANDARD</StorageClass></Contents>"
            )
            at += 1
        truncated = at < len(self.keys) and self.keys[at].startswith(prefix)
        more = f"<NextContinuationToken>{self.keys[at - 1].encode().hex()}</NextContinuationToken>" if truncated else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>synthetic</Name><EncodingType>url</EncodingType><KeyCount>{len(items)}</KeyCount>"
            f"<IsTruncated>{str(truncated).lower()}</IsTruncated>{more}{''.join(items)}</ListBucketResult>"
        )

    def _index(self, key: str, side: Any) -> int:
        return int(side(self.keys, key.encode(), key=str.encode))


def _handler_of(store: SyntheticStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            status, text = store.answer(query)
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


if __name__ == "__main__":
    store = SyntheticStore([line.rstrip("\n") for line in sys.stdin])
    print(store.environment["AWS_ENDPOINT_URL"], flush=True)
    store.thread.join()
