"""s3fs whose requests survive what passes: 503, a connection that breaks, silence, a body that drips or breaks off.

Whatever goes through the filesystem is covered, a file object of `open` as well as a listing by `call_s3`. An answer
counts when its body has come whole, so an object is in memory before it is handed out; read large ones by `open`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import ClientError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.errors import translate_boto_error

from pipelines import retries

MOVES_AN_OBJECT = ("get_object", "put_object", "upload_part")
LARGEST_PUT = 5 * 2**30
KMS = ("aws:kms", "aws:kms:dsse")


class WithoutExpect(AIOHTTPSession):  # type: ignore[misc]
    """What aiobotocore sends requests with, but asking for no `100 Continue`: a round trip less for every PUT.

    NOTE aiohttp waits for that answer without a limit of its own, whatever the read timeout.
    """

    async def send(self, request: Any) -> Any:
        request.headers.pop("Expect", None)
        return await super().send(request)


OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,  # another worker may have written since
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 60,
        "retries": {"total_max_attempts": 1},  # `retries.repeated` does it
        "max_pool_connections": 128,  # a request that waits for a connection has its time running
        "http_session_cls": WithoutExpect,
    },
}


class WholeBody:
    """A body that has been read, as s3fs expects one that has not."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self) -> bytes:
        """All of it, every time."""
        return self._data

    def close(self) -> None:
        """Nothing is open."""


class PatientS3(S3FileSystem):  # type: ignore[misc]
    """See the head of the module."""

    retries = 1  # s3fs's own loops, which have no jitter and know neither 500 nor a connection that was reset

    async def _call_s3(self, method: str, *defaults: Any, **arguments: Any) -> Any:
        return await retries.repeated(lambda: self._attempt(method, *defaults, **arguments))

    call_s3 = sync_wrapper(_call_s3)

    async def _attempt(self, method: str, *defaults: Any, **arguments: Any) -> Any:
        await self.set_session()
        call = getattr(await self.get_s3(arguments.get("Bucket")), method)
        arguments = self._get_s3_method_kwargs(call, *defaults, **arguments)
        seconds = retries.LISTING_SECONDS
        if method in MOVES_AN_OBJECT:
            seconds = retries.seconds_for(len(arguments.get("Body", b"")))
        async with asyncio.timeout(seconds) as limit:
            try:
                answer = await call(**arguments)
            except ClientError as error:
                raise translate_boto_error(error) from error
            if method == "get_object":
                limit.reschedule(asyncio.get_running_loop().time() + retries.seconds_for(answer["ContentLength"]))
                body = answer["Body"]
                try:
                    answer["Body"] = WholeBody(await body.read())
                finally:
                    body.close()  # a connection whose body came whole is back in the pool already
        return answer

    async def _get_whole(self, path: str) -> tuple[bytes, str]:
        """An object's bytes and its ETag, "" where that is known to be no checksum.

        One request: s3fs's own `cat_file` asks for the size first, which doubles the cost of a small object.
        """
        bucket, key, _ = self.split_path(path)
        answer = await self._call_s3("get_object", Bucket=bucket, Key=key)
        encrypted = answer.get("ServerSideEncryption") in KMS or "SSECustomerAlgorithm" in answer
        return await answer["Body"].read(), "" if encrypted else answer.get("ETag", "").strip('"')

    get_whole = sync_wrapper(_get_whole)

    def put_whole(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        """One PUT, never an upload in parts, which if it is cut leaves parts that cost money."""
        self.pipe_file(path, data, chunksize=LARGEST_PUT // 2, mode=mode)


# fsspec keeps instances by class. Whoever empties s3fs's own cache, as after a change of AWS_ENDPOINT_URL, means these.
PatientS3._cache = S3FileSystem._cache
