"""Images out of a Parquet file: the image column and the key column alone are read, page by page.

In memory are a page, a buffer and a batch of rows. NOTE pyarrow's writer ends a page only after 1,024 rows, so that a
row group of fewer large images is a single page: it is read whole.
"""

from __future__ import annotations

from collections.abc import Generator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.bulk.shard_source import Member, ShardError, ShardSource, too_large
from pipelines.storage import BLOCK_SIZE

BATCH_BYTES = 8 * 1024 * 1024  # of images that are decoded from their pages at a time
BATCH_ROWS = 256
SHOWN_COLUMNS = 30


def read_parquet(
    source: ShardSource, image_column: str, key_column: str, max_bytes: int
) -> Generator[Member, None, None]:
    """A member for each row. Raises ShardError, and pyarrow's errors if the file is damaged."""
    # With pre_buffer, or without a buffer, the column of a whole row group would be fetched in one piece.
    file = pq.ParquetFile(source, pre_buffer=False, buffer_size=BLOCK_SIZE, page_checksum_verification=True)
    leaf = _image_leaf(source, file.schema_arrow, image_column)
    columns = [leaf, *([key_column] if key_column in file.schema_arrow.names else [])]
    number = 0
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(_batch_rows(file, group, leaf), [group], columns, use_threads=False):
            images = _storage(batch.column(image_column))
            if leaf != image_column:
                images = pc.struct_field(images, "bytes")  # null where the struct is
            keys = _texts(source, batch.column(key_column)) if len(columns) > 1 else [None] * len(batch)
            for image, key in zip(images, keys, strict=True):
                name = str(number) if key is None else key
                number += 1
                if not image.is_valid:
                    yield Member(name, None, f"there is no image in this row: {leaf} is null")
                else:
                    yield too_large(name, image.as_buffer().size, max_bytes) or Member(name, image.as_py(), None)
    if not number:
        raise ShardError(f"{source.uri} holds no image: it has no rows")


def _image_leaf(source: ShardSource, schema: pa.Schema, image_column: str) -> str:
    """What to read, `image` or `image.bytes`; raises ShardError if there is no image in it."""
    if image_column not in schema.names:
        some = ", ".join(schema.names[:SHOWN_COLUMNS]) + (", ..." if len(schema.names) > SHOWN_COLUMNS else "")
        raise ShardError(
            f"{source.uri} has no column {image_column!r}; set segment.image_column to one of its own: {some or 'none'}"
        )
    kind = schema.field(image_column).type
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if _is_binary(kind):
        return image_column
    if pa.types.is_struct(kind) and (at := kind.get_field_index("bytes")) >= 0 and _is_binary(kind.field(at).type):
        return f"{image_column}.bytes"
    raise ShardError(
        f"{source.uri}: the column {image_column!r} is {kind}, not encoded images; segment.image_column has to name "
        "one that is binary, or a struct with binary `bytes`"
    )


def _is_binary(kind: pa.DataType) -> bool:
    tests = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view
    return any(test(kind) for test in tests)


def _batch_rows(file: pq.ParquetFile, group: int, leaf: str) -> int:
    """Rows to decode at a time, by the mean size of an image in this row group."""
    described = file.metadata.row_group(group)
    columns = (described.column(i) for i in range(described.num_columns))
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == leaf)
    return max(1, min(BATCH_ROWS, BATCH_BYTES * described.num_rows // max(1, size)))


def _storage(column: pa.Array) -> pa.Array:
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _texts(source: ShardSource, column: pa.Array) -> list[str | None]:
    """Names out of a column of strings, bytes or whole numbers; bytes that are no UTF-8 are written as \\xNN."""
    column = _storage(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type):
        return [None if value is None else str(value) for value in column.to_pylist()]
    try:
        raw = column.cast(pa.large_binary())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ShardError(
            f"{source.uri}: the key column is {column.type}; segment.key_column has to name one of strings or integers"
        ) from None
    return [None if value is None else value.decode("utf-8", "backslashreplace") for value in raw.to_pylist()]
