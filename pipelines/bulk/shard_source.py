"""A shard's bytes for the libraries that read it, and the two ways in which that can fail.

What the store refuses, after the filesystem's own repetitions, stays a StorageError; bytes that are no shard are a
ShardError. Libraries mix the two up: to pyarrow both are an OSError, to tarfile an answer that ends early is a damaged
archive.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

import pyarrow as pa

from pipelines.errors import RepsepError, StorageError
from pipelines.storage import Folder, storage_errors

WHOLE_BYTES = 64 * 1024 * 1024
# What pyarrow, tarfile and the decompressors raise on bytes that are not theirs; a size claimed there can be beyond
# memory, a chain of headers beyond the stack.
DAMAGE = (
    pa.ArrowException,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    MemoryError,
    RecursionError,
)


class ShardError(RepsepError):
    """A shard that cannot be read as a whole; the message says why."""


class Member(NamedTuple):
    """One image of a shard: its name there, and either its encoded bytes or why there are none."""

    name: str
    data: bytes | None
    error: str | None


def too_large(name: str, size: int, max_bytes: int) -> Member | None:
    """A member with an error if it has more bytes than may be read."""
    if size <= max_bytes:
        return None
    return Member(name, None, f"the encoded image has {size:,} bytes, more than the {max_bytes:,} that are read")


class ShardSource(io.RawIOBase):
    """A shard as a file that can be read and sought in. Raises StorageError.

    A small one out of a store is fetched whole, in one request, as only then its bytes can be compared with its ETag.
    """

    def __init__(self, folder: Folder, key: str) -> None:
        self.uri = folder.uri_of(key)
        self.failed: StorageError | None = None  # the last word of the store, whatever a library made of it
        self.at = 0
        self.handle: IO[bytes] = folder.open(key)
        self.size = self.handle.seek(0, io.SEEK_END)
        if not folder.local and self.size <= WHOLE_BYTES:
            self.handle.close()
            data = folder.read(key)
            self.handle, self.size = io.BytesIO(data), len(data)

    def begin(self) -> bytes:
        """The first bytes, which tell formats apart; the position is 0 after it."""
        self.seek(0)
        found = self.read(8)
        self.seek(0)
        return found

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self.at)
        size = left if size is None or size < 0 else min(size, left)
        try:
            with storage_errors(self.uri):
                data = self._read(size) if size else b""
        except StorageError as error:
            self.failed = error
            raise
        self.at += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self.handle.close()
        super().close()

    def _read(self, size: int) -> bytes:
        if self.handle.tell() != self.at:
            self.handle.seek(self.at)
        data = self.handle.read(size)
        if len(data) < size:
            raise OSError(f"{len(data):,} bytes came instead of {size:,} from byte {self.at:,} on")
        return data


@contextlib.contextmanager
def shard_errors(source: ShardSource) -> Iterator[None]:
    """Turn what libraries raise on damaged bytes into a ShardError."""
    try:
        yield
    except RepsepError:
        raise
    except DAMAGE as error:
        if source.failed is not None:
            raise source.failed from None
        raise ShardError(
            f"{source.uri} cannot be read ({type(error).__name__}: {error}); it has {source.size:,} bytes and begins "
            f"with {source.begin()!r}. Write it again, or take it out of the input"
        ) from error
