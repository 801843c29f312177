"""Bulk segmentation over HTTP on a real cluster: every image accounted for, whatever is wrong with it."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.bulk import job
from pipelines.bulk.commits import Output
from pipelines.config import Recipe, SegmentConfig
from pipelines.errors import RepsepError, UsageError
from pipelines.segment import segment
from pipelines.stage import Receipt
from pipelines.storage import Folder
from repsep_model.images import decode_mask

pytestmark = pytest.mark.ray


@pytest.fixture
def bucket(s3: str, scenes: Path) -> str:
    """A bucket with six good images in two folders of the same base names, a truncated one, an empty one and a text."""
    folder = Folder(f"s3://{s3}/in")
    for file in sorted((scenes / "unlabelled").rglob("*.jpg")):
        folder.write(file.relative_to(scenes / "unlabelled").as_posix(), file.read_bytes())
    whole = next((scenes / "unlabelled").rglob("*.jpg")).read_bytes()
    folder.write("a/truncated.jpg", whole[: len(whole) // 2])
    folder.write("a/ünïcode 100%+.JPG", whole)
    folder.write("empty.png", b"")
    folder.write("notes.txt", b"not an image")
    return s3


def asked(recipe: Recipe, bucket: str, trained: Receipt, **more: object) -> Recipe:
    section = {"source": f"s3://{bucket}/in", "target": f"s3://{bucket}/in/labelled", "model": trained.results["model"]}
    return recipe.model_copy(update={"segment": SegmentConfig.model_validate(section | more)})


def run(workspace: str, recipe: Recipe) -> Receipt:
    receipt = segment(workspace, recipe)
    assert isinstance(receipt, Receipt)
    return receipt


def rows(bucket: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = Output(Folder(f"s3://{bucket}/in/labelled")).results().to_pylist()
    return found


def test_every_image_has_one_row_and_the_bad_ones_say_why(
    bucket: str, trained: Receipt, recipe: Recipe, workspace: str
) -> None:
    receipt = run(workspace, asked(recipe, bucket, trained))
    by_key = {str(row["key"]): row for row in rows(bucket)}
    assert len(by_key) == len(rows(bucket)) == 9
    assert {key for key, row in by_key.items() if row["status"] == "failed"} == {"a/truncated.jpg", "empty.png"}
    assert by_key["a/truncated.jpg"]["stage"] == by_key["empty.png"]["stage"] == "decode"
    assert "empty" in str(by_key["empty.png"]["error"])
    target = Folder(f"s3://{bucket}/in/labelled")
    for key, row in by_key.items():
        if row["status"] == "ok":
            mask = decode_mask(target.read(f"masks/{key}.png"))
            assert mask.shape == (row["height"], row["width"])
            assert mask.max() < 7
    report = json.loads(target.read("report.json"))
    assert (report["ok"], report["failed"], report["skipped"]) == (7, 2, 1)
    assert receipt.results["failures"] == {"decode": 2}


def test_a_second_run_over_a_finished_bucket_reads_no_image(
    bucket: str, trained: Receipt, recipe: Recipe, workspace: str
) -> None:
    first = run(workspace, asked(recipe, bucket, trained))
    target = Folder(f"s3://{bucket}/in/labelled")
    before = sorted((e.key, e.etag) for e in target.list())
    second = run(workspace, asked(recipe, bucket, trained))
    assert second.cached
    assert second == first
    assert sorted((e.key, e.etag) for e in target.list()) == before


def test_new_and_changed_images_are_taken_and_failed_ones_only_when_asked(
    bucket: str, scenes: Path, trained: Receipt, recipe: Recipe, workspace: str
) -> None:
    run(workspace, asked(recipe, bucket, trained))
    source = Folder(f"s3://{bucket}/in")
    one, two = sorted((scenes / "images" / "val").glob("*.jpg"))[:2]
    changed_key = next(e.key for e in source.list("a/") if "trunc" not in e.key and "code" not in e.key)
    source.write(changed_key, one.read_bytes())
    source.write("later/new.jpg", two.read_bytes())
    receipt = run(workspace, asked(recipe, bucket, trained))
    assert (receipt.results["ok"], receipt.results["failed"], receipt.results["rows"]) == (2, 0, 10)
    source.write("a/truncated.jpg", one.read_bytes())  # mended: a new version, so it is taken
    receipt = run(workspace, asked(recipe, bucket, trained, retry_failed=True))
    assert (receipt.results["ok"], receipt.results["failed"], receipt.results["failed_rows"]) == (1, 1, 1)
    source.delete("empty.png")  # what is not there any more is no failure of today
    receipt = run(workspace, asked(recipe, bucket, trained))
    assert (receipt.results["ok"], receipt.results["failed_rows"]) == (0, 0)


def test_another_model_on_the_same_output_is_refused_until_overwrite(
    bucket: str, trained: Receipt, recipe: Recipe, workspace: str, tmp_path: Path
) -> None:
    run(workspace, asked(recipe, bucket, trained, limit=1))
    with pytest.raises(UsageError, match=r"bf16.*new prefix, or --overwrite"):
        segment(workspace, asked(recipe, bucket, trained, bf16=False))
    receipt = run(workspace, asked(recipe, bucket, trained, bf16=False, overwrite=True, limit=2))
    assert receipt.results["rows"] == 2


def test_a_dry_run_counts_and_writes_nothing(bucket: str, trained: Receipt, recipe: Recipe, workspace: str) -> None:
    counts = segment(workspace, asked(recipe, bucket, trained), dry_run=True)
    assert counts == {"images": 9, "to_do": 9, "done": 0, "failed_before": 0, "skipped": 1}
    assert not list(Folder(f"s3://{bucket}/in").list("labelled"))


def test_a_mistyped_source_leaves_the_output_alone_even_with_overwrite(
    s3: str, trained: Receipt, recipe: Recipe, workspace: str
) -> None:
    target = Folder(f"s3://{s3}/in/labelled")
    Output(target).claim({"model": "another"}, {"classes": []}, overwrite=False)
    target.write("masks/a.jpg.png", b"its mask")
    with pytest.raises(UsageError, match="holds no image"):
        segment(workspace, asked(recipe, s3, trained, overwrite=True))
    assert target.read("masks/a.jpg.png") == b"its mask"


def test_an_empty_prefix_says_what_was_found(s3: str, trained: Receipt, recipe: Recipe, workspace: str) -> None:
    Folder(f"s3://{s3}/in").write("readme.md", b"nothing here")
    with pytest.raises(UsageError, match=rf"s3://{s3}/in holds no image and no shard \(1 other objects there"):
        segment(workspace, asked(recipe, s3, trained))


def test_a_job_in_which_everything_fails_is_stopped(s3: str, trained: Receipt, recipe: Recipe, workspace: str) -> None:
    folder = Folder(f"s3://{s3}/in")
    for number in range(40):
        folder.write(f"{number}.jpg", b"<html>not an image</html>")
    with pytest.raises(RepsepError, match=r"of the first 2\d images failed.*max_failure_rate"):
        segment(workspace, asked(recipe, s3, trained))


def test_an_output_that_cannot_be_written_fails_the_job_with_its_uri(
    bucket: str, trained: Receipt, recipe: Recipe, workspace: str
) -> None:
    with pytest.raises(RepsepError, match="s3://no-such-bucket-here"):
        segment(workspace, asked(recipe, bucket, trained, target="s3://no-such-bucket-here/out"))


@pytest.mark.parametrize("step", ["decode", "model"])
def test_an_image_that_kills_its_process_becomes_a_row_and_the_job_ends(
    step: str, bucket: str, trained: Receipt, recipe: Recipe, workspace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is staged: a step that dies on one image takes its whole process with it."""

    def read_or_die(todo: Any, source: str, config: SegmentConfig) -> Any:
        from pipelines.bulk.job import _read  # the worker's own

        if any("code" in key for key in todo["key"].to_pylist()):
            os.kill(os.getpid(), signal.SIGKILL)
        yield from _read(todo, source, config)

    class SegmentOrDie(job.SegmentActor):
        def __call__(self, images: Any) -> Any:
            if any("code" in key for key in images["key"].to_pylist()):
                os.kill(os.getpid(), signal.SIGKILL)
            yield from super().__call__(images)

    if step == "decode":
        monkeypatch.setattr(job, "_read", read_or_die)
    else:
        monkeypatch.setattr(job, "SegmentActor", SegmentOrDie)
    receipt = run(workspace, asked(recipe, bucket, trained))
    assert receipt.results["rows"] == len(rows(bucket)) == 9
    assert receipt.results["failures"] == {"decode": 2, "worker": 1}
    (lost,) = [row for row in rows(bucket) if row["stage"] == "worker"]
    assert lost["key"] == "a/ünïcode 100%+.JPG"


def test_parts_side_by_side_make_one_output_and_the_last_one_compacts(
    bucket: str, trained: Receipt, recipe: Recipe, workspace: str
) -> None:
    target = Output(Folder(f"s3://{bucket}/in/labelled"))
    counts = []
    for number in (2, 3, 1):
        assert target.results().num_rows == 0
        receipt = run(workspace, asked(recipe, bucket, trained, shard=f"{number}/3"))
        counts.append(receipt.results["images"])
    assert sum(counts) == len(rows(bucket)) == 9
    assert sorted(str(row["key"]) for row in rows(bucket)) == sorted({str(row["key"]) for row in rows(bucket)})
    report = json.loads(target.folder.read("report.json"))
    assert (report["images"], report["ok"], report["failed"]) == (9, 7, 2)
    whole = segment(workspace, asked(recipe, bucket, trained), dry_run=True)
    assert whole == {"images": 9, "to_do": 0, "done": 7, "failed_before": 2, "skipped": 1}


@pytest.fixture
def shards(s3: str, scenes: Path) -> str:
    """Two shards of three good images each, one of them with a bad image as well, and a tar that was cut short."""
    folder = Folder(f"s3://{s3}/in")
    images = [file.read_bytes() for file in sorted((scenes / "unlabelled").rglob("*.jpg"))]
    table, out = pa.table({"key": ["x", "y", "z"], "image": images[:3], "caption": ["", "", ""]}), io.BytesIO()
    pq.write_table(table, out)
    folder.write("a/one.parquet", out.getvalue())
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in {
            "1.jpg": images[3],
            "1.json": b"{}",
            "2.jpg": b"",
            "3.jpg": images[4],
            "4.jpg": images[5],
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    folder.write("two.tar", out.getvalue())
    folder.write("cut.tar", out.getvalue()[:1500])
    return s3


def test_shards_become_shards_of_masks_in_the_same_order_and_every_image_has_its_row(
    shards: str, trained: Receipt, recipe: Recipe, workspace: str
) -> None:
    receipt = run(workspace, asked(recipe, shards, trained, confidence=True))
    target = Folder(f"s3://{shards}/in/labelled")
    by_key = {str(row["key"]): row for row in rows(shards)}
    assert sorted(by_key) == sorted(
        [
            "a/one.parquet#x",
            "a/one.parquet#y",
            "a/one.parquet#z",
            "cut.tar",
            *(f"two.tar#{i}.jpg" for i in (1, 2, 3, 4)),
        ]
    )
    assert {key: row["stage"] for key, row in by_key.items() if row["status"] == "failed"} == {
        "cut.tar": "decode",
        "two.tar#2.jpg": "decode",
    }
    assert (receipt.results["input"], receipt.results["images"], receipt.results["ok"]) == ("shards", 3, 6)
    for shard, names in {"a/one.parquet": ["x", "y", "z"], "two.tar": ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]}.items():
        masks = pq.read_table(io.BytesIO(target.read(f"masks/{shard}.parquet"))).to_pylist()
        assert [mask["key"] for mask in masks] == names
        for mask in masks:
            row = by_key[f"{shard}#{mask['key']}"]
            assert (mask["mask"] is None) == (row["status"] == "failed") == (mask["status"] == "failed")
            assert row["uri"] == f"s3://{shards}/in/{shard}"
            if mask["mask"] is not None:
                assert (
                    decode_mask(mask["mask"]).shape == (row["height"], row["width"]) == (mask["height"], mask["width"])
                )
                assert row["mask_uri"] == target.uri_of(f"masks/{shard}.parquet")
                assert mask["confidence"] is not None
    again = run(workspace, asked(recipe, shards, trained, confidence=True))
    assert again.cached
    retried = run(workspace, asked(recipe, shards, trained, confidence=True, retry_failed=True))
    assert (retried.results["ok"], retried.results["failed"], retried.results["rows"]) == (3, 2, 8)


def test_an_image_has_the_same_mask_in_a_shard_and_alone(
    shards: str, scenes: Path, trained: Receipt, recipe: Recipe, workspace: str
) -> None:
    first = min((scenes / "unlabelled").rglob("*.jpg"))
    run(workspace, asked(recipe, shards, trained))
    section = {"source": str(first), "target": f"s3://{shards}/alone", "model": trained.results["model"]}
    segment(workspace, recipe.model_copy(update={"segment": SegmentConfig.model_validate(section)}))
    masks = pq.read_table(io.BytesIO(Folder(f"s3://{shards}/in/labelled").read("masks/a/one.parquet.parquet")))
    assert Folder(f"s3://{shards}/alone").read(f"masks/{first.name}.png") == masks["mask"][0].as_py()


def test_images_and_shards_under_one_prefix_have_to_be_told_apart(
    shards: str, trained: Receipt, recipe: Recipe, workspace: str
) -> None:
    Folder(f"s3://{shards}/in").write("one.png", b"")
    with pytest.raises(UsageError, match=r"segment\.input=images"):
        segment(workspace, asked(recipe, shards, trained))
    counts = segment(workspace, asked(recipe, shards, trained, input="images"), dry_run=True)
    assert counts == {"images": 1, "to_do": 1, "done": 0, "failed_before": 0, "skipped": 3}
