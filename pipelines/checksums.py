"""Whether the bytes that came are the bytes that were stored.

The ETag of an object that was written by one PUT is the MD5 of its bytes on most stores, though none promises it: not
if it is encrypted with KMS, nor after an upload in parts (those have a "-"). So an ETag that does not fit is a doubt,
no proof: the object is read again. The same bytes twice came through unharmed; other bytes every time did not.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from itertools import chain

from pipelines.retries import GaveUpError, pauses

LIKE_MD5 = re.compile("[0-9a-f]{32}").fullmatch
REFUTED = 3  # objects in a row


class Checksums:
    """Reads with a second look. One for each store: it learns where ETags are no checksums and then asks them no more.

    NOTE shared by threads without a lock: the worst that a race does is one more read of an object.
    """

    def __init__(self) -> None:
        self._fit = False
        self._refuted = 0

    def read(self, get: Callable[[], tuple[bytes, str]], etag: str | None = None, size: int | None = None) -> bytes:
        """The bytes of an object. Raises GaveUpError if they differ from one read to the next.

        `get` reads it and says the ETag beside it, "" for none; `etag` and `size` are those of its listing. An object
        that was replaced since then is no fault: its own ETag fits.
        """
        seen: set[bytes] = set()
        for pause in chain([0.0], pauses()):
            if pause:
                time.sleep(pause)
            data, answered = get()
            sums = [each for each in (answered, etag) if each and LIKE_MD5(each)] if self._asked() else []
            size_fits = size is None or size == len(data)
            if size_fits and not sums:
                return data
            digest = hashlib.md5(data, usedforsecurity=False)
            if digest.hexdigest() in sums:
                self._fit = True
                return data
            if digest.digest() in seen:
                self._refuted += bool(sums)
                return data
            seen.add(digest.digest())
        raise GaveUpError(f"read {len(seen)} times, and other bytes came every time; none fits the ETag or the size")

    def _asked(self) -> bool:
        return self._fit or self._refuted < REFUTED
