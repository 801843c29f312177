"""Bulk segmentation over HTTP on a real cluster: every image accounted for, whatever is wrong with it."""

from __future__ import annotations

import importlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import pipelines.segment as segment_module
from pipelines.commits import Output
from pipelines.config import Recipe, SegmentConfig
from pipelines.errors import RepsepError, UsageError
from pipelines.segment import Plan, segment
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
    plan = segment(workspace, asked(recipe, bucket, trained), dry_run=True)
    assert isinstance(plan, Plan)
    assert (plan.listed, len(plan.todo), plan.skipped, plan.done) == (9, 9, 1, 0)
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
    with pytest.raises(UsageError, match=rf"s3://{s3}/in holds no image \(1 other objects there"):
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


def test_an_image_that_kills_its_worker_becomes_a_row_and_the_job_ends(
    bucket: str, trained: Receipt, recipe: Recipe, workspace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is staged: a decoder that dies on one image takes its whole process with it."""

    def read_or_die(todo: Any, source: str, config: SegmentConfig) -> Any:
        if any("code" in key for key in todo["key"].to_pylist()):
            os.kill(os.getpid(), signal.SIGKILL)
        return importlib.import_module("pipelines.segment")._read(todo, source, config)  # the worker's own

    def one_or_die(row: dict[str, Any], *rest: Any) -> Any:
        if "code" in row["key"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return importlib.import_module("pipelines.segment")._segment_one(row, *rest)

    monkeypatch.setattr(segment_module, "_read", read_or_die)
    monkeypatch.setattr(segment_module, "_segment_one", one_or_die)
    receipt = run(workspace, asked(recipe, bucket, trained, runtime={"retries": 0, "batch_size": 3}))
    assert receipt.results["rows"] == len(rows(bucket)) == 9
    assert receipt.results["failures"] == {"decode": 2, "worker": 1}
    (lost,) = [row for row in rows(bucket) if row["stage"] == "worker"]
    assert lost["key"] == "a/ünïcode 100%+.JPG"
