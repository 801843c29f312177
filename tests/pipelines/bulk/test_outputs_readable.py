"""What others read: results and masks of shards by DuckDB, pandas and pyarrow, with one line each as in the README."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipelines.bulk.commits import Output
from pipelines.bulk.shards import mask_table
from pipelines.storage import Folder
from repsep_model.images import decode_mask, encode_mask

START = datetime(2026, 11, 22, tzinfo=UTC)
IMAGES, CHANGED = 300, 40
STATE = ["key", "etag", "status", "stage", "height", "confidence", "mask_uri"]


def row(output: Output, number: int, version: int) -> dict[str, Any]:
    key = f"{number % 3}/ünï 100%+ {number}.jpg"
    failed = number % 10 == 0
    found: dict[str, Any] = {"key": key, "uri": f"s3://photos/{key}", "etag": f"v{version}", "size": 1000 + number}
    found |= {"seconds": 0.5, "model_version": "models:/m/1", "finished_at": START + timedelta(hours=version)}
    if failed:
        return found | {"status": "failed", "stage": "decode", "error": "the object is empty"}
    found |= {"status": "ok", "height": 10, "width": number, "pixels": [10 * number, 0], "confidence": number / IMAGES}
    return found | {"mask_uri": output.folder.uri_of(f"masks/{key}.png")}


def filled(uri: str) -> Output:
    """Three compactions, of new rows and of new versions of old ones; what the last one leaves is committed too."""
    output = Output(Folder(uri))
    for version, numbers in enumerate((range(200), range(150, IMAGES), range(CHANGED))):
        for start in range(0, len(numbers), 25):
            output.commit([row(output, number, version) for number in numbers[start : start + 25]])
        output.compact()
    return output


def expected(output: Output) -> list[tuple[Any, ...]]:
    """The state of each image, sorted, from what was committed."""
    newest = {number: 1 if number >= 150 else 0 for number in range(IMAGES)} | dict.fromkeys(range(CHANGED), 2)
    rows = [dict.fromkeys(STATE) | row(output, number, version) for number, version in newest.items()]
    return ordered([tuple(r[name] for name in STATE) for r in rows])


def ordered(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Sorted by key; floats as the results hold them."""
    return sorted(tuple(np.float32(v).item() if isinstance(v, float) else v for v in r) for r in rows)


def of_frame(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    without_nan = frame[STATE].astype(object).where(frame[STATE].notna(), None)
    return ordered(list(without_nan.itertuples(index=False, name=None)))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Output:
    return filled(str(tmp_path_factory.mktemp("bulk") / "out"))


@pytest.fixture
def remote(s3: str) -> Output:
    return filled(f"s3://{s3}/out")


def test_duckdb_sees_one_row_for_each_image_after_several_compactions(local: Output) -> None:
    with duckdb.connect() as db:
        found = db.sql(f"SELECT {', '.join(STATE)} FROM '{local.folder.uri}/results/*.parquet'").fetchall()
    assert ordered(found) == expected(local)


def test_pandas_sees_the_same(local: Output) -> None:
    assert of_frame(pd.read_parquet(f"{local.folder.uri}/results")) == expected(local)


def test_every_column_has_a_type_that_duckdb_and_pandas_know(local: Output) -> None:
    with duckdb.connect() as db:
        described = db.sql(f"DESCRIBE SELECT * FROM '{local.folder.uri}/results/*.parquet'").fetchall()
        (areas,) = db.sql(f"SELECT sum(pixels[1]), sum(size) FROM '{local.folder.uri}/results/*.parquet'").fetchall()
    types = {name: kind for name, kind, *_ in described}
    assert (types["pixels"], types["finished_at"]) == ("BIGINT[]", "TIMESTAMP WITH TIME ZONE")
    assert areas == (sum(10 * n for n in range(IMAGES) if n % 10), sum(1000 + n for n in range(IMAGES)))
    frame = pd.read_parquet(f"{local.folder.uri}/results")
    assert frame["finished_at"].max() == START + timedelta(hours=2)
    assert sum(p[0] for p in frame["pixels"] if p is not None) == areas[0]


def test_pandas_pyarrow_and_duckdb_read_results_from_a_bucket(remote: Output) -> None:
    uri = f"{remote.folder.uri}/results"
    assert of_frame(pd.read_parquet(uri)) == expected(remote)
    s3 = fsspec.filesystem("s3")
    dataset = pyarrow.dataset.dataset(uri.removeprefix("s3://"), filesystem=s3)
    assert of_frame(dataset.to_table().to_pandas()) == expected(remote)
    with duckdb.connect() as db:
        db.register_filesystem(s3)
        found = db.sql(f"SELECT {', '.join(STATE)} FROM '{uri}/*.parquet'").fetchall()
    assert ordered(found) == expected(remote)


def test_masks_of_shards_are_tables_that_duckdb_and_pandas_read(tmp_path: Path) -> None:
    colours = [(0, 0, 0), (255, 0, 0)]
    folder = Folder(str(tmp_path))
    labels = {f"{i}.jpg": np.full((5, 7), i % 2, np.uint8) for i in range(6)}
    for shard in ("a/x.tar", "b/x.tar"):
        rows: list[dict[str, Any]] = [
            {"key": name, "mask": encode_mask(ids, colours), "height": 5, "width": 7, "status": "ok"}
            for name, ids in labels.items()
        ]
        rows.append({"key": "bad.jpg", "status": "failed", "error": "the object is empty"})
        folder.write(f"masks/{shard}.parquet", mask_table(rows))
    frame = pd.read_parquet(f"{tmp_path}/masks/a/x.tar.parquet")
    assert list(frame["key"]) == [*labels, "bad.jpg"]
    assert frame["mask"].isna().tolist() == [False] * 6 + [True]
    for name, mask in zip(frame["key"][:6], frame["mask"], strict=False):
        assert np.array_equal(decode_mask(mask), labels[name])
    with duckdb.connect() as db:
        found = db.sql(f"SELECT key, mask FROM '{tmp_path}/masks/**/*.parquet' WHERE status = 'ok'").fetchall()
    assert sorted(key for key, _ in found) == sorted([*labels, *labels])
    assert all(np.array_equal(decode_mask(mask), labels[key]) for key, mask in found)


def test_a_table_of_results_holds_no_type_of_one_library(local: Output) -> None:
    """Spark has no unsigned integers, and DuckDB and Spark do not know Arrow's own schema."""
    parts = sorted(Path(local.folder.uri, "results").glob("*.parquet"))
    assert parts
    for part in parts:
        schema = pq.ParquetFile(part).schema_arrow
        assert not any(pa.types.is_unsigned_integer(f.type) or pa.types.is_dictionary(f.type) for f in schema)
