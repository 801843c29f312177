"""The steps of bulk segmentation, driven by hand: what a bucket gets is what one image alone would get.

Shapes: H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines.bulk import model_step, steps
from pipelines.bulk.attempts import FAILED_STATE, OK_STATE
from pipelines.bulk.commits import Output, ReplacedError
from pipelines.bulk.model_step import SegmentImages
from pipelines.bulk.shard_step import SegmentShards
from pipelines.bulk.steps import (
    IMAGE_SCHEMA,
    LABEL_SCHEMA,
    CommitMasks,
    CommitSettings,
    ReadImages,
    Row,
    result_row,
    to_rows,
    to_table,
)
from pipelines.config import SegmentConfig, TrackingConfig
from pipelines.errors import RepsepError, StorageError
from pipelines.models import FILES, fetch_model, load_files
from pipelines.retries import GaveUpError
from pipelines.storage import Folder
from repsep_model import checkpoint
from repsep_model.checkpoint import save_segmentor
from repsep_model.config import SegmentorConfig
from repsep_model.images import decode_image, decode_mask
from repsep_model.inference import Segmentation, segment_image
from repsep_model.segmentor import Segmentor
from tests.model.tiny import PVT, VIT, K, tiny_segmentor
from tests.pipelines.layout import encoded, picture

COLOURS = tuple((40 * i, 255 - 40 * i, 7) for i in range(K))
WINDOW = 64


def saved(folder: Path, family: SegmentorConfig) -> Path:
    """A segmentor with random weights."""
    classes = [{"id": i, "name": f"c{i}", "color": list(colour)} for i, colour in enumerate(COLOURS)]
    model = tiny_segmentor(replace(family, window=WINDOW))
    save_segmentor(model, folder, classes={"name": "tiny", "ignore_index": 255, "classes": classes})
    return folder


def files_of(directory: Path) -> dict[str, bytes]:
    with fetch_model(str(directory), TrackingConfig()) as model:
        return model.files()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("vit"), VIT)


@pytest.fixture(scope="module")
def model(directory: Path) -> Segmentor:
    return load_files(files_of(directory))


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Segmentor:
    return load_files(files_of(saved(tmp_path_factory.mktemp("pvt"), PVT)))


@pytest.fixture(autouse=True)
def loaded_once(model: Segmentor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a model takes longer than anything that is tested here."""
    monkeypatch.setattr(model_step, "load_files", lambda files: model)


@pytest.fixture
def bucket(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "in"))


def config_of(**settings: Any) -> SegmentConfig:
    """Every image whole, unless a test says otherwise: that is what batches are made of."""
    return SegmentConfig.model_validate({"bf16": False, "pixel_budget": 4 * 1024 * 1024} | settings)


def todo(*keys: str) -> list[Row]:
    return [{"n": n, "key": key, "etag": "v1", "size": 1} for n, key in enumerate(keys)]


def handed_over(rows: list[Row], schema: pa.Schema, **channels: int) -> list[Row]:
    """As a table from process to process."""
    return to_rows(to_table(rows, schema), channels)


def segmented(config: SegmentConfig, bucket: Folder, *keys: str) -> list[Row]:
    read = handed_over(list(ReadImages(bucket.uri, config)(todo(*keys))), IMAGE_SCHEMA, pixels=3)
    return handed_over(SegmentImages({}, config)(read), LABEL_SCHEMA, labels=1, confidence_map=1)


def blocks(number: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) with areas of one colour: smoother than noise, so that a mask has areas too."""
    coarse = picture(number, height // 16 + 1, width // 16 + 1)
    return np.kron(coarse, np.ones((16, 16, 1), np.uint8))[:height, :width]


def expected(model: Segmentor, data: bytes, config: SegmentConfig, **more: Any) -> Segmentation:
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    return segment_image(model, decode_image(data), dtype=dtype, **{"pixel_budget": config.pixel_budget} | more)


@pytest.fixture
def segment(bucket: Folder) -> Callable[..., dict[str, dict[str, Any]]]:
    """Reads and segments keys of the bucket; rows by key."""

    def run(config: SegmentConfig, *keys: str) -> dict[str, dict[str, Any]]:
        rows = segmented(config, bucket, *keys)
        assert [row["key"] for row in rows] == list(keys), "rows keep their order"
        return {row["key"]: row for row in rows}

    return run


@pytest.fixture
def bulk(bucket: Folder, tmp_path: Path) -> Callable[..., tuple[Output, list[Row]]]:
    """All three steps; the output, compacted, and what the driver is told."""

    def run(config: SegmentConfig, *keys: str) -> tuple[Output, list[Row]]:
        target = str(tmp_path / "out")
        commit = CommitMasks(CommitSettings(bucket.uri, target, COLOURS, config.confidence, "tiny/1", 4))
        told = commit(segmented(config, bucket, *keys))
        output = Output(Folder(target))
        output.compact()
        return output, told

    return run


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (50, 77), (33, 20), (100, 64)])
def test_a_mask_is_what_segment_image_gives(
    segment: Callable[..., Any], model: Segmentor, bucket: Folder, bf16: bool, height: int, width: int
) -> None:
    config = config_of(bf16=bf16, confidence=True)
    data = encoded(blocks(1, height, width))
    bucket.write("a.png", data)
    row = segment(config, "a.png")["a.png"]
    alone = expected(model, data, config)
    assert row["error"] is None
    assert np.array_equal(row["labels"], alone.labels)
    # In a full batch sums are rounded otherwise than alone: next to a half that is another whole number.
    apart = np.abs(row["confidence_map"] - alone.confidence * 255)
    assert apart.max() < 0.501
    assert len(np.unique(alone.labels)) > 1, "a mask of one class would prove little"


@pytest.mark.parametrize("family", ["plain", "pyramid"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_batch", [1, 4])
def test_a_mask_does_not_depend_on_the_images_beside_it(
    segment: Callable[..., Any],
    bucket: Folder,
    bf16: bool,
    model_batch: int,
    family: str,
    pyramid: Segmentor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if family == "pyramid":
        monkeypatch.setattr(model_step, "load_files", lambda files: pyramid)
    config = config_of(bf16=bf16, model_batch=model_batch, confidence=True)
    sizes = {"x": (60, 90), "a": (64, 96), "b": (40, 70), "c": (64, 65), "d": (33, 96), "e": (50, 80), "o": (64, 32)}
    for number, (key, size) in enumerate(sizes.items()):
        bucket.write(key, encoded(blocks(number, *size)))
    alone = segment(config, "x")["x"]
    for company in ("xabc", "abcx", "oedcbax", "ex"):  # first, last, in a second batch, with one neighbour
        rows = segment(config, *company)
        assert np.array_equal(rows["x"]["labels"], alone["labels"]), f"another mask in {company}"
        assert np.array_equal(rows["x"]["confidence_map"], alone["confidence_map"]), f"another confidence in {company}"


def test_the_model_is_always_called_with_full_batches(
    segment: Callable[..., Any], bucket: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    real = model_step.segment_batch

    def recorded(model: Segmentor, images: torch.Tensor, sizes: Any, **how: Any) -> Any:
        shapes.append(tuple(images.shape))
        return real(model, images, sizes, **how)

    monkeypatch.setattr(model_step, "segment_batch", recorded)
    for number, size in enumerate([(60, 90), (64, 96), (64, 65), (32, 32)]):
        bucket.write(f"{number}", encoded(blocks(number, *size)))
    segment(config_of(model_batch=2), "0", "1", "2", "3")
    assert sorted(shapes) == [(2, 3, 32, 32), (2, 3, 64, 96), (2, 3, 64, 96)]


def test_an_image_over_the_pixel_budget_goes_by_windows(
    segment: Callable[..., Any], model: Segmentor, bucket: Folder
) -> None:
    config = config_of(pixel_budget=100 * 150 - 1, model_batch=4)
    large, small = encoded(blocks(1, 100, 150)), encoded(blocks(2, 100, 149))
    bucket.write("large", large)
    bucket.write("small", small)
    rows = segment(config, "small", "large")
    whole, windows = (expected(model, large, config, pixel_budget=budget).labels for budget in (10**9, 0))
    assert np.array_equal(rows["large"]["labels"], windows)
    assert not np.array_equal(whole, windows), "this image would not tell the two apart"
    assert np.array_equal(rows["small"]["labels"], expected(model, small, config).labels)


@pytest.mark.parametrize("family", ["plain", "pyramid"])
def test_without_a_budget_a_plain_vit_goes_by_windows_and_a_pyramid_does_not(
    model: Segmentor, pyramid: Segmentor, bucket: Folder, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, data, config = model if family == "plain" else pyramid, encoded(blocks(1, 100, 150)), config_of()
    monkeypatch.setattr(model_step, "load_files", lambda files: chosen)
    bucket.write("photo", data)
    whole, windows = (expected(chosen, data, config, pixel_budget=budget).labels for budget in (10**9, 0))
    assert not np.array_equal(whole, windows), "this image would not tell the two apart"
    found = segmented(config_of(pixel_budget=None), bucket, "photo")[0]["labels"]
    assert np.array_equal(found, windows if family == "plain" else whole)


def test_a_directory_that_holds_no_segmentor_is_refused(directory: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(RepsepError, match=r"model\.safetensors is missing; give a directory"),
        fetch_model(str(tmp_path / "nowhere"), TrackingConfig()),
    ):
        pytest.fail("it was fetched")
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:-10] if file.suffix == ".safetensors" else b"{}")
    with fetch_model(str(tmp_path), TrackingConfig()) as broken, pytest.raises(RepsepError, match="cannot be loaded"):
        load_files(broken.files())


# ---------------------------------------------------------------- bad images

GOOD = encoded(blocks(3, 40, 60), "JPEG")
BAD: dict[str, tuple[bytes | None, str, str]] = {
    "truncated.jpg": (encoded(picture(0, 64, 64), "JPEG")[:2000], "decode", "JPEG cannot be decoded"),
    "empty.png": (b"", "decode", "the object is empty"),
    "gone.jpg": (None, "read", "gone.jpg: there is nothing there"),
    "page.jpg": (b"<html><body>503 Service Unavailable</body></html>", "decode", "not an image that Pillow can read"),
    "huge.png": (encoded(blocks(0, 80, 100)), "decode", "100 x 80 pixels are over the limit of 5000"),
}


def test_bad_images_become_failed_rows_with_the_stage_and_the_reason_and_the_good_ones_are_committed(
    bulk: Callable[..., tuple[Output, list[Row]]], bucket: Folder
) -> None:
    for key, (data, _, _) in BAD.items():
        if data is not None:
            bucket.write(key, data)
    bucket.write("first.jpg", GOOD)
    bucket.write("last.jpg", GOOD)
    output, told = bulk(config_of(max_pixels=5000), "first.jpg", *BAD, "last.jpg")
    rows = {row["key"]: row for row in output.results().to_pylist()}
    assert sorted(rows) == sorted(["first.jpg", "last.jpg", *BAD])
    for key, (_, stage, reason) in BAD.items():
        row = rows[key]
        assert (row["status"], row["stage"]) == ("failed", stage)
        assert reason in row["error"]
        assert row["uri"] == f"{bucket.uri}/{key}"
        assert [row[name] for name in ("pixels", "confidence", "mask_uri", "height")] == [None] * 4
        assert row["model_version"] == "tiny/1"
    for key in ("first.jpg", "last.jpg"):
        assert (rows[key]["status"], rows[key]["stage"], rows[key]["error"]) == ("ok", None, None)
    assert sorted(e.key for e in output.folder.list("masks/")) == ["masks/first.jpg.png", "masks/last.jpg.png"]
    told_rows = {row["key"]: row for row in told}
    assert {key: row["status"] for key, row in told_rows.items()} == {k: r["status"] for k, r in rows.items()}
    assert told_rows["empty.png"]["stage"] == "decode"


def test_a_batch_of_bad_images_alone_is_committed_too(
    bulk: Callable[..., tuple[Output, list[Row]]], bucket: Folder
) -> None:
    bucket.write("empty.png", b"")
    output, _ = bulk(config_of(), "empty.png", "gone.jpg")
    assert output.results()["status"].to_pylist() == ["failed", "failed"]
    assert list(output.folder.list("masks/")) == []


def test_an_image_that_a_silent_store_keeps_back_is_left_for_another_round_and_a_row_at_the_end(
    bucket: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Folder.read

    def silent_for_one(folder: Folder, key: str, **more: Any) -> bytes:
        if key == "kept.jpg":
            raise StorageError("it was silent") from GaveUpError("every one of 8 attempts failed")
        return real(folder, key, **more)

    for key in ("here.jpg", "kept.jpg"):
        bucket.write(key, GOOD)
    monkeypatch.setattr(Folder, "read", silent_for_one)
    output = Output(Folder(str(tmp_path / "out")))
    settings = CommitSettings(bucket.uri, output.folder.uri, COLOURS, False, "tiny/1", 4)
    told = CommitMasks(settings)(segmented(config_of(), bucket, "here.jpg", "kept.jpg"))
    assert {row["key"]: row.get("status") for row in told} == {"here.jpg": "ok", "kept.jpg": None}
    assert output.compact().rows == 1
    CommitMasks(replace(settings, final=True))(segmented(config_of(), bucket, "kept.jpg"))
    assert output.compact().rows == 2
    row = output.results().to_pylist()[1]
    assert (row["key"], row["status"], row["stage"], row["error"]) == ("kept.jpg", "failed", "read", "it was silent")


def test_an_image_that_the_model_cannot_take_fails_alone(
    bulk: Callable[..., tuple[Output, list[Row]]], bucket: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = model_step.segment_batch

    def fails_on_wide(model: Segmentor, images: torch.Tensor, sizes: Any, **how: Any) -> Any:
        if images.shape[-1] > 100:
            raise RuntimeError("out of memory")
        return real(model, images, sizes, **how)

    monkeypatch.setattr(model_step, "segment_batch", fails_on_wide)
    bucket.write("wide.png", encoded(blocks(0, 40, 120)))
    bucket.write("narrow.png", encoded(blocks(0, 40, 60)))
    output, _ = bulk(config_of(), "wide.png", "narrow.png")
    narrow, wide = output.results().to_pylist()
    assert narrow["status"] == "ok"
    assert (wide["status"], wide["stage"], wide["error"]) == ("failed", "segment", "RuntimeError: out of memory")


def test_an_image_that_no_step_could_finish_has_a_whole_row_as_well(bucket: Folder, tmp_path: Path) -> None:
    output = Output(Folder(str(tmp_path / "out")))
    listed = {"key": "killer.jpg", "etag": "v7", "size": 5}
    output.commit([result_row(listed | {"stage": "worker", "error": "its worker process died"}, bucket, "tiny/1")])
    totals = output.compact()
    assert (totals.rows, totals.failed) == (1, 1)
    (row,) = output.results().to_pylist()
    assert (row["key"], row["etag"], row["size"], row["stage"]) == ("killer.jpg", "v7", 5, "worker")
    assert row["uri"] == f"{bucket.uri}/killer.jpg"


# ---------------------------------------------------------------- what is written

KEYS = ["a/0001.png", "b/0001.png", "ünï 100%.png", "_long/x.png"]


def test_rows_say_what_is_in_the_masks(
    bulk: Callable[..., tuple[Output, list[Row]]], model: Segmentor, bucket: Folder
) -> None:
    config = config_of()
    for number, key in enumerate(KEYS):
        bucket.write(key, encoded(blocks(number, 40 + number, 60)))
    output, _ = bulk(config, *KEYS)
    rows = output.results().to_pylist()
    assert [row["key"] for row in rows] == sorted(KEYS)
    for row in rows:
        mask = decode_mask(output.folder.read(row["mask_uri"].removeprefix(f"{output.folder.uri}/")))
        alone = expected(model, bucket.read(row["key"]), config)
        assert np.array_equal(mask, alone.labels)
        assert (row["height"], row["width"]) == mask.shape
        assert row["pixels"] == np.bincount(mask.ravel(), minlength=K).tolist()
        assert row["confidence"] == pytest.approx(float(alone.confidence.mean()), abs=1 / 255)
        assert row["seconds"] > 0
        assert row["etag"] == "v1"
    assert {row["key"]: row["mask_uri"].removeprefix(f"{output.folder.uri}/") for row in rows} == {
        "a/0001.png": "masks/a/0001.png.png",
        "b/0001.png": "masks/b/0001.png.png",
        "ünï 100%.png": "masks/ünï 100%.png.png",
        "_long/x.png": "masks/%5Flong/x.png.png",
    }


def test_a_mask_is_an_indexed_png_in_the_classes_colours(
    bulk: Callable[..., tuple[Output, list[Row]]], bucket: Folder
) -> None:
    bucket.write("a.jpg", GOOD)
    output, _ = bulk(config_of(), "a.jpg")
    with Image.open(io.BytesIO(output.folder.read("masks/a.jpg.png"))) as mask:
        assert (mask.format, mask.mode, mask.size) == ("PNG", "P", (60, 40))
        palette = mask.getpalette() or []
        assert [tuple(palette[3 * i : 3 * i + 3]) for i in range(K)] == list(COLOURS)


def test_confidence_is_written_when_asked_for_only(
    bulk: Callable[..., tuple[Output, list[Row]]], model: Segmentor, bucket: Folder
) -> None:
    bucket.write("a.jpg", GOOD)
    bucket.write("b.jpg", GOOD)
    output, _ = bulk(config_of(), "a.jpg")
    assert list(output.folder.list("confidence/")) == []
    output, _ = bulk(config_of(confidence=True), "b.jpg")
    with Image.open(io.BytesIO(output.folder.read("confidence/b.jpg.png"))) as image:
        assert image.mode == "L"
        found = np.asarray(image)
    assert np.array_equal(found, np.rint(expected(model, GOOD, config_of()).confidence * 255))


def test_the_same_images_again_give_the_same_bytes(
    bulk: Callable[..., tuple[Output, list[Row]]], bucket: Folder
) -> None:
    for number, key in enumerate(KEYS):
        bucket.write(key, encoded(blocks(number, 40 + number, 60)))
    output, _ = bulk(config_of(model_batch=4), *KEYS)
    first = {e.key: output.folder.read(e.key) for e in output.folder.list("masks/")}
    output, _ = bulk(config_of(model_batch=4), *reversed(KEYS))
    assert {e.key: output.folder.read(e.key) for e in output.folder.list("masks/")} == first
    assert output.results().num_rows == len(KEYS)


def test_a_large_image_is_decoded_by_the_model_s_step_and_gets_the_same_mask(
    segment: Callable[..., Any], model: Segmentor, bucket: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(pixel_budget=1024)
    data = encoded(blocks(1, 100, 150))
    bucket.write("large.png", data)
    monkeypatch.setattr(steps, "LARGE_PIXELS", 10_000)
    (read,) = ReadImages(bucket.uri, config)(todo("large.png"))
    assert (read["pixels"], read["error"]) == (None, None)
    fresh = dict(read)
    (found,) = SegmentImages({}, config, read=lambda row: steps.decode(row, lambda: data, 10**9))([read])
    assert np.array_equal(found["labels"], expected(model, data, config, pixel_budget=0).labels)
    assert (found["height"], found["width"]) == (100, 150)
    (broken,) = SegmentImages({}, config, read=lambda row: steps.decode(row, lambda: data[: len(data) // 2], 10**9))(
        [fresh]
    )
    assert (broken["stage"], broken["labels"]) == ("decode", None)


def test_the_masks_of_a_job_whose_output_was_replaced_are_not_put(shard: tuple[SegmentShards, Row]) -> None:
    step, listed = shard
    step.output.claim({"model": "m1"}, {}, overwrite=False)
    Output(step.output.folder).claim({"model": "m2"}, {}, overwrite=True)
    settings = replace(step.settings, generation=step.output.generation)
    labelled = todo("a.png")[0] | {"error": None, "labels": np.zeros((2, 3), np.uint8), "confidence_map": None}
    for late in (lambda: step(listed), lambda: CommitMasks(settings)([labelled])):
        with pytest.raises(ReplacedError, match="replaced this output"):
            late()
    assert [entry.key for entry in step.output.folder.list()] == ["classes.json", "run.json"]


@pytest.fixture
def shard(directory: Path, bucket: Folder, tmp_path: Path) -> tuple[SegmentShards, Row]:
    """The step over shards, and a listed shard of three images."""
    out = io.BytesIO()
    pq.write_table(pa.table({"key": ["x", "y", "z"], "image": [encoded(picture(i)) for i in range(3)]}), out)
    bucket.write("s.parquet", out.getvalue())
    settings = CommitSettings(bucket.uri, str(tmp_path / "out"), COLOURS, False, "m", 2)
    return SegmentShards(files_of(directory), config_of(), settings), todo("s.parquet")[0]


def worker_dies(on: str) -> Callable[..., Row]:
    def decode_or_die(row: Row, fetch: Callable[[], bytes], max_pixels: int) -> Row:
        found = steps.decode(row, fetch, max_pixels)
        return found | {"pixels": None, "stage": "worker", "error": "it died"} if row["name"] in on else found

    return decode_or_die


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "failed"),
    [("", "y", "y"), ("y", "", ""), ("x", "yz", "yz"), ("", "xyz", ""), ("x", "xyz", "x")],
)
def test_of_two_attempts_at_a_shard_the_rows_are_those_of_the_one_whose_masks_are_there(
    shard: tuple[SegmentShards, Row], first: str, second: str, failed: str, compacted: bool
) -> None:
    """An attempt in which every image fails puts no masks."""
    step, listed = shard
    for dies_on in (first, second):
        step.decode = worker_dies(dies_on)
        step(dict(listed))
        if compacted:
            step.output.compact()
    state = int(step.output.committed().states([step.source.uri_of("s.parquet")], [listed["etag"]])[0])
    step.output.compact()
    masks = pq.read_table(io.BytesIO(step.output.folder.read("masks/s.parquet.parquet"))).to_pylist()
    rows = step.output.results().to_pylist()
    assert "".join(row["key"][-1] for row in rows if row["status"] == "failed") == failed
    assert [(f"s.parquet#{m['key']}", m["status"]) for m in masks] == [(row["key"], row["status"]) for row in rows]
    assert [m["mask"] is None for m in masks] == [row["mask_uri"] is None for row in rows]
    assert state == (FAILED_STATE if failed else OK_STATE)


def test_the_files_that_are_handed_on_are_those_that_are_saved() -> None:
    assert FILES == (checkpoint.WEIGHTS, checkpoint.SETTINGS, checkpoint.CLASSES)
