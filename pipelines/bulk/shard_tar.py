"""Images out of a tar, read as a stream: plain, or compressed with gzip, bzip2 or xz whatever its name says.

NOTE tarfile takes an archive that was cut between two members for complete, a damaged header for its end, and does not
verify what gzip says of its data: each would lose images without a word.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Generator
from typing import IO, Any, cast

from pipelines.bulk.shard_source import Member, ShardError, ShardSource, too_large

BUFFER = 1 << 20
HEADER_BYTES = 1 << 20  # of an extended header: a path needs a few hundred
# Headers that tarfile reads whole, whatever size they claim, before anybody sees the member.
EXTENDED = (b"x", b"g", b"X", tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}


def read_tar(source: ShardSource, include: tuple[str, ...], max_bytes: int) -> Generator[Member, None, None]:
    """A member for each file that ends in one of `include` (lower case). Nothing is extracted to disk.

    Raises ShardError, and what tarfile and the decompressors raise if the archive is damaged.
    """
    passed, found = 0, 0
    options: dict[str, Any] = {"tarinfo": _Header, "encoding": "utf-8", "errors": "backslashreplace"}
    with tarfile.open(fileobj=_decompressed(source), mode="r|", bufsize=BUFFER, **options) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep the header of every member
            if not (member.isreg() and member.name.lower().endswith(include)):
                passed += 1
                continue
            found += 1
            if refused := too_large(member.name, member.size, max_bytes):
                yield refused
                continue
            handle = archive.extractfile(member)
            assert handle is not None  # as it is a regular file
            with handle:
                yield Member(member.name, handle.read(), None)
        _read_to_end(source, cast(IO[bytes], archive.fileobj))
    if not found:
        raise ShardError(
            f"{source.uri} holds no image: none of its {passed} members is a file that ends in {', '.join(include)} "
            "(segment.include)"
        )


def _decompressed(source: ShardSource) -> IO[bytes]:
    begin = source.begin()
    for magic, opener in COMPRESSIONS.items():
        if begin.startswith(magic):
            return cast(IO[bytes], opener(source))
    return cast(IO[bytes], source)


def _read_to_end(source: ShardSource, stream: IO[bytes]) -> None:
    """What follows the end mark may only be padding; reading it also verifies a checksum at the very end."""
    while rest := stream.read(BUFFER):
        if rest.strip(b"\0"):
            raise ShardError(
                f"{source.uri}: there is more behind the end of the archive; archives that were joined with cat have "
                "to be packed again as one"
            )


class _Header(tarfile.TarInfo):
    """A member's header, read strictly: only an end mark is the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        try:
            found = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # as it should be
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it ends without an end mark, so it was cut short") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a damaged header: {error}") from None
        if found.size < 0:
            raise tarfile.ReadError(f"{found.name!r} claims a negative size")
        return found

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        found = super().frombuf(buf, encoding, errors)
        if found.type in EXTENDED and found.size > HEADER_BYTES:
            raise tarfile.ReadError(f"a header of type {found.type!r} with {found.size:,} bytes")
        return found
