"""How a request to a store is repeated when it fails in a way that may pass.

An attempt has a limit of time that grows with its bytes, so that a body that drips is cut. Between attempts lies an
exponential back-off with full jitter (Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015):
many workers that were refused at one moment do not come back at one moment.

This is the only place that repeats. botocore's own modes are switched off: `standard` stops repeating when a process
has had too many faults in all, which during an outage is at once, and neither covers a body that breaks off.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

Answer = TypeVar("Answer")

ATTEMPTS = 8  # of which one in ten fails: 1 operation of 100,000,000 is lost
FIRST_PAUSE = 0.1  # seconds; the longest that the first pause may be, doubled for every further one
LONGEST_PAUSE = 10.0
PATIENCE = 180.0  # seconds after which no further attempt begins
ANSWER_SECONDS = 30.0  # for an attempt, beside what its bytes take
SLOWEST = 64 * 1024  # bytes a second; what is slower is cut and tried again
LISTING_SECONDS = 120.0  # for what moves no object: a listing of a large bucket, the end of an upload

# What stores answer to a request that was good, beside the statuses 408, 429 and 5xx.
TRANSIENT_CODES = {
    "SlowDown",
    "RequestTimeout",
    "RequestLimitExceeded",
    "ThrottlingException",
    "Throttling",
    "OperationAborted",
    "ConditionalRequestConflict",  # several conditional PUTs of one key at one moment: AWS asks to try again
    "BadDigest",  # these three: what arrived at the store is not what was sent
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
}

# Not the global generator, whose state belongs to whoever seeded it; and processes that were forked must differ.
_jitter = random.SystemRandom()


class GaveUpError(OSError):
    """Every attempt met a fault that might have passed. Says how many there were and of what kind.

    `unanswered`: the last of them was no word of a store, so it may be that none is there.
    """

    def __init__(self, message: str, *, unanswered: bool = False) -> None:
        super().__init__(message)
        self.unanswered = unanswered


def pauses() -> Iterator[float]:
    """Seconds to wait before each further attempt; ends when the attempts or the patience are used up."""
    end = time.monotonic() + PATIENCE
    for number in range(ATTEMPTS - 1):
        if time.monotonic() >= end:
            return
        yield _jitter.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**number))


def seconds_for(size: int) -> float:
    """The limit of one attempt that moves an object of `size` bytes."""
    return ANSWER_SECONDS + size / SLOWEST


async def repeated(attempt: Callable[[], Awaitable[Answer]]) -> Answer:
    """The answer of the first attempt that meets no transient fault. Raises GaveUpError, or what is not transient."""
    faults: Counter[str] = Counter()
    for pause in itertools.chain((None,), pauses()):  # whose patience begins when the first attempt has failed
        if pause is not None:
            await asyncio.sleep(pause)
        try:
            return await attempt()
        except Exception as error:
            if not is_transient(error):
                raise
            last = error
        if not faults:
            began = time.monotonic()
        faults[in_words(last)] += 1
    kinds = ", ".join(f"{count} x {kind}" for kind, count in faults.most_common())
    raise GaveUpError(
        f"every one of {faults.total()} attempts failed, the last {time.monotonic() - began:.1f} s after the first "
        f"({kinds})",
        unanswered=_store_answer(last) is None,
    ) from last


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if status_and_code := _store_answer(error):
        status, code = status_and_code
        return code in TRANSIENT_CODES or status in (408, 429) or (status >= 500 and status not in (501, 505))
    # What follows has been imported by whoever raised it. aiohttp: a body that breaks off; botocore: all the rest.
    from aiohttp import ClientError as AiohttpError
    from botocore import exceptions as botocore
    from botocore.parsers import ResponseParserError

    kinds = (
        TimeoutError,
        ConnectionError,
        AiohttpError,
        ResponseParserError,  # the text of an overloaded proxy where XML should be
        botocore.HTTPClientError,
        botocore.ConnectionError,
        botocore.IncompleteReadError,
        botocore.FlexibleChecksumError,
    )
    return isinstance(error, kinds)


def in_words(error: BaseException) -> str:
    """The kind of a fault, short enough to be counted."""
    if status_and_code := _store_answer(error):
        status, code = status_and_code
        return f"{status} {code}" if code != str(status) else code
    if type(error) is TimeoutError:
        return "timeout: no whole answer in time"
    return f"{type(error).__name__}: {error}"


def _store_answer(error: BaseException) -> tuple[int, str] | None:
    """HTTP status and code of a refusal by the store, behind s3fs's own error or by itself."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict) and "Error" in response:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response["Error"].get("Code", ""))
    return None
