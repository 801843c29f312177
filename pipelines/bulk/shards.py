"""Shards: many images in one object, a Parquet file with an image column or a tar in WebDataset's layout.

An object that ends in `.parquet` or `.pq` is read as Parquet (shard_parquet.py), any other as a tar (shard_tar.py).

    image          taken from                                               its name in the shard
    Parquet row    the image column: binary, or the `bytes` of a struct as  the key column; where there is none, or it
                   Hugging Face's datasets writes it                        is null, the row's number from 0
    tar member     a file with an image's extension; folders, links and     its path in the archive, as it is written
                   other files (labels, captions) are passed over

Names are unique within a shard: a second `x` becomes `x@<number>` with its number, from 0, among the shard's images.
A shard that cannot be read to its end is refused as a whole: no image of it is lost without a word.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Iterable, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bulk.shard_parquet import read_parquet
from pipelines.bulk.shard_source import Member, ShardError, ShardSource, shard_errors
from pipelines.bulk.shard_tar import read_tar
from pipelines.config import SegmentConfig
from pipelines.storage import Folder

__all__ = ["MASK_SCHEMA", "MAX_BYTES", "Member", "ShardError", "mask_table", "read_shard"]

PARQUET = (".parquet", ".pq")
INCLUDE: tuple[str, ...] = SegmentConfig.model_fields["include"].default
MAX_BYTES = 1 << 30  # of one encoded image
MASK_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("mask", pa.large_binary()),  # PNG
        ("confidence", pa.large_binary()),  # PNG
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
MASK_GROUP = 256  # rows in a row group: so few that a reader needs little memory


def read_shard(
    folder: Folder,
    key: str,
    *,
    image_column: str,
    key_column: str,
    include: tuple[str, ...] = INCLUDE,
    max_bytes: int = MAX_BYTES,
) -> Generator[Member, None, None]:
    """The images of a shard in its order, a few megabytes at a time; nothing is written to disk.

    An image that is null or over `max_bytes` is a member with an error. Raises, possibly after some members, ShardError
    if the shard is damaged, has no such image column or holds no image at all, and StorageError as `Folder` does.
    """
    names: set[str] = set()
    with contextlib.closing(ShardSource(folder, key)) as source, shard_errors(source):
        if source.size == 0:
            raise ShardError(f"{source.uri} is empty: it has 0 bytes")
        if key.lower().endswith(PARQUET):
            found = read_parquet(source, image_column, key_column, max_bytes)
        else:
            found = read_tar(source, tuple(ending.lower() for ending in include), max_bytes)
        with contextlib.closing(found):
            for number, member in enumerate(found):
                name = member.name
                while name in names:
                    name = f"{name}@{number}"
                names.add(name)
                yield member._replace(name=name)
                del member  # else its bytes would stay in memory until the next one is there


def mask_table(rows: Iterable[Mapping[str, Any]], *, confidence: bool = False) -> bytes:
    """`masks/<shard>.parquet`: a row for each image in the order given, written as they come.

    A row has `key` (the name in the shard), `mask` (PNG bytes, null where failed), with `confidence` that as well,
    `height`, `width`, `status` and `error`. What a row lacks is null. The same rows give the same bytes.
    """
    schema = MASK_SCHEMA if confidence else MASK_SCHEMA.remove(MASK_SCHEMA.get_field_index("confidence"))
    pictures = {field.name for field in schema if pa.types.is_large_binary(field.type)}
    options: dict[str, Any] = {
        "compression": {name: "none" if name in pictures else "zstd" for name in schema.names},  # PNG is compressed
        "use_dictionary": ["status", "error"],
        "write_statistics": [name for name in schema.names if name not in pictures],
        "write_batch_size": 16,  # NOTE only after so many rows is it asked whether a page is full
    }
    out, left = io.BytesIO(), iter(rows)
    with pq.ParquetWriter(out, schema, **options) as writer:
        while some := list(islice(left, MASK_GROUP)):
            columns = {name: [row.get(name) for row in some] for name in schema.names}
            writer.write_table(pa.table(columns, schema=schema))
    return out.getvalue()
