"""The page of a bulk output: its figures are those of the rows, its pictures those of the masks; it runs nothing."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.bulk import pictures as pictures_module
from pipelines.bulk.commits import CLASSES as CLASSES_FILE
from pipelines.bulk.commits import PAGE, ROW_SCHEMA, Output
from pipelines.bulk.page import write_page
from pipelines.bulk.pictures import PICTURE_WIDTH, SHARDS_READ
from pipelines.bulk.shards import mask_table
from pipelines.bulk.survey import (
    BINS,
    COLUMNS,
    FAILURES_SHOWN,
    OTHER_REASONS,
    REASONS_SHOWN,
    SAMPLE_PIXELS,
    SAMPLES,
    SHARDS_SAMPLED,
    Kind,
    Reason,
    Survey,
    survey,
    survey_of,
)
from pipelines.config import SegmentConfig
from pipelines.errors import StorageError
from pipelines.reporting.bulk_run import bulk_facts
from pipelines.storage import Folder
from repsep_model.images import UInt8, encode_mask, overlay

COLOURS = [(250, 10, 10), (10, 10, 250), (240, 240, 10)]
CLASSES = {
    "name": "streets",
    "classes": [{"id": i, "name": n, "color": list(c)} for i, (n, c) in enumerate(zip("abc", COLOURS, strict=True))],
}
REPORT: dict[str, Any] = {
    "source": "s3://photos/in",
    "target": "s3://photos/out",
    "model": "models:/streets/3",
    "input": "images",
    "images": 1_234_567,
    "skipped": 17,
    "ok": 1_200_000,
    "failed": 4_321,
    "done_before": 29_826,
    "failed_before": 120,
    "failed_rows": 4_321,
    "failures": {"decode": 4_000, "read": 321},
    "seconds": 7_500.0,
    "images_per_s": 160.58,
    "megapixels_per_s": 48.2,
    "rates": {"reader": 812.5, "model": 161.2, "writer": None, "end_to_end": 160.58},
    "bottleneck": "model",
    "cost_per_1000_images": 0.00519,
    "price_per_hour": 3.0,
}


def ok_row(key: str, confidence: float = 0.9, *, size: tuple[int, int] = (4, 6), **more: Any) -> dict[str, Any]:
    return {
        "key": key,
        "uri": f"/in/{key}",
        "etag": "1",
        "status": "ok",
        "height": size[0],
        "width": size[1],
        "confidence": confidence,
        "pixels": [size[0] * size[1], 0, 0],
        "mask_uri": f"/out/masks/{key}.png",
        "finished_at": datetime.now(UTC),
    } | more


def failed_row(key: str, stage: str, error: str, **more: Any) -> dict[str, Any]:
    row = {"key": key, "uri": f"/in/{key}", "etag": "1", "status": "failed", "stage": stage, "error": error}
    return row | {"finished_at": datetime.now(UTC)} | more


def tables(rows: list[dict[str, Any]], cut: int) -> Iterator[pa.Table]:
    for start in range(0, len(rows), cut):
        yield pa.Table.from_pylist(rows[start : start + cut], schema=ROW_SCHEMA).select(COLUMNS)


def surveyed(rows: list[dict[str, Any]], cut: int = 100, kind: Kind = "images") -> Survey:
    return survey(tables(rows, cut), kind)


def mixed(count: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    rows = [ok_row(f"{i:04d}.jpg", rng.randrange(100) / 100 + 0.003) for i in range(count)]
    return rows + [failed_row(f"bad/{i}.jpg", "decode", f"truncated after {i} bytes") for i in range(count // 10)]


def test_a_survey_does_not_depend_on_how_rows_are_ordered_and_cut() -> None:
    rows = mixed(500)
    one = surveyed(rows)
    random.Random(2).shuffle(rows)
    other = surveyed(rows, cut=7)
    assert [r["key"] for r in one.sample] == [r["key"] for r in other.sample]
    assert [r["key"] for r in one.least_confident] == [r["key"] for r in other.least_confident]
    assert one.histogram.tolist() == other.histogram.tolist()
    assert [r["key"] for r in one.failures] == [r["key"] for r in other.failures]
    assert one.reasons == other.reasons == [Reason("decode", "truncated after 0 bytes", "bad/0.jpg", 50)]


def test_histogram_and_least_confident_are_those_of_all_rows_sorted() -> None:
    rows = mixed(500)
    found = surveyed(rows, cut=33)
    done = [r for r in rows if r["status"] == "ok"]
    expected = sorted(done, key=lambda r: (np.float32(r["confidence"]), r["key"]))[:SAMPLES]
    assert [r["key"] for r in found.least_confident] == [r["key"] for r in expected]
    bins = Counter(min(int(float(np.float32(r["confidence"])) * BINS), BINS - 1) for r in done)
    assert found.histogram.tolist() == [bins[i] for i in range(BINS)]
    assert (found.rows, found.failed) == (550, 50)


def test_the_sample_takes_each_image_with_the_same_probability() -> None:
    taken: Counter[int] = Counter()
    for draw in range(300):
        rows = [ok_row(f"{draw}/{i}.jpg") for i in range(4 * SAMPLES)]
        taken.update(int(r["key"].split("/")[1][:-4]) for r in surveyed(rows, cut=len(rows)).sample)
    assert sum(taken.values()) == 300 * SAMPLES
    expected, sigma = 75, (300 * 0.25 * 0.75) ** 0.5
    assert set(taken) == set(range(4 * SAMPLES))
    assert max(abs(n - expected) for n in taken.values()) < 4.5 * sigma


def test_what_a_survey_keeps_does_not_grow_with_the_rows() -> None:
    allocated = []

    def watched() -> Iterator[pa.Table]:
        for part in range(40):
            yield from tables([ok_row(f"{'long/' * 40}{part}/{i}.jpg") for i in range(500)], cut=500)
            allocated.append(pa.total_allocated_bytes())

    assert survey(watched(), "images").rows == 20_000
    assert max(allocated[20:]) < 1.5 * max(allocated[2:6])


def test_rows_that_another_job_compacts_meanwhile_are_read_again_and_counted_once(bulk: Bulk) -> None:
    bulk.add("a.png", 100, 0)
    bulk.page()
    rest = list(bulk.output.tables(COLUMNS))
    attempts = 0

    class Compacted(Output):
        def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
            nonlocal attempts
            attempts += 1
            yield from rest
            if attempts < 3:
                raise StorageError("another job has just changed the results")

    assert survey_of(Compacted(bulk.output.folder), "images").rows == 1
    assert attempts == 3


def test_failures_are_counted_by_reason_apart_from_names_and_numbers() -> None:
    rows = [failed_row(f"{i}.jpg", "read", f"/in/{i}.jpg: there is nothing there") for i in range(30)]
    rows += [failed_row(f"a{i}.jpg", "decode", f"({i} x {i}) pixels are over the limit of 7") for i in range(4)]
    rows += [failed_row("x", "decode", "x extra bytes in the index", uri="/in/y.tar")]
    found = surveyed(rows)
    assert [(r.stage, r.error, r.rows) for r in found.reasons] == [
        ("read", "…: there is nothing there", 30),
        ("decode", "(0 x 0) pixels are over the limit of 7", 4),
        ("decode", "… extra bytes in the index", 1),
    ]
    assert [r["key"] for r in found.failures] == sorted(r["key"] for r in rows)[:FAILURES_SHOWN]


def test_reasons_without_end_are_counted_together() -> None:
    words = ["".join(random.Random(i).choices("ghijklmnop", k=12)) for i in range(3 * REASONS_SHOWN)]
    found = surveyed([failed_row(f"{i}.jpg", "decode", word) for i, word in enumerate(words)])
    assert len(found.reasons) == REASONS_SHOWN + 1
    assert (found.reasons[-1].error, found.reasons[-1].rows) == (OTHER_REASONS, 2 * REASONS_SHOWN)


def test_images_too_large_for_a_page_are_no_samples_and_rows_without_confidence_are_no_obstacle() -> None:
    rows = [ok_row("large.tif", size=(SAMPLE_PIXELS, 1)), ok_row("larger.tif", size=(SAMPLE_PIXELS + 1, 1))]
    rows += [ok_row("none.png", confidence=None)]  # type: ignore[arg-type]
    found = surveyed(rows)
    assert {r["key"] for r in found.sample} == {"large.tif", "none.png"}
    assert found.histogram.sum() == len(found.least_confident) == 2


def test_samples_of_shards_come_whole_from_the_same_few_shards_in_any_order() -> None:
    shards = [f"{i:03d}.tar" for i in range(4 * SHARDS_SAMPLED)]
    rows = [ok_row(f"{s}#{i}.jpg", uri=f"/in/{s}") for s in shards for i in range(2 * SAMPLES)]
    one = surveyed(rows, cut=50, kind="shards")
    random.Random(3).shuffle(rows)
    other = surveyed(rows, cut=31, kind="shards")
    assert [r["key"] for r in one.sample] == [r["key"] for r in other.sample]
    assert Counter(Counter(r["uri"] for r in one.sample).values()) == {SAMPLES: SHARDS_SAMPLED}


class Tags(html.parser.HTMLParser):
    """Elements with their attributes, and the text that a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


class Bulk:
    """An input and an output in a temporary folder; a source image is of one grey, its mask all of one class."""

    def __init__(self, root: Path) -> None:
        self.source, self.output = Folder(f"{root}/in"), Output(Folder(f"{root}/out"))
        self.rows: list[dict[str, Any]] = []

    def add(
        self, key: str, grey: int, label: int, *, size: tuple[int, int] = (40, 60), confidence: float = 0.9
    ) -> None:
        self.source.write(key, picture(grey, size))
        mask = f"masks/{key}.png"
        self.output.folder.write(mask, encode_mask(np.full(size, label, np.uint8), COLOURS))
        self.row(key, size, label, uri=key, mask=mask, confidence=confidence)

    def add_shard(self, key: str, names: list[str], *, tar: bool, column: str = "image") -> None:
        """Greys are 10, 20, ... in order, labels 0, 1, 2, 0, ..."""
        size, mask = (40, 60), f"masks/{key}.parquet"
        files = {name: picture(10 * (i + 1), size) for i, name in enumerate(names)}
        out = io.BytesIO()
        if tar:
            with tarfile.open(fileobj=out, mode="w") as archive:
                for name, data in files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        else:
            pq.write_table(pa.table({column: list(files.values()), "key": names}), out)
        self.source.write(key, out.getvalue())
        masks = []
        for i, name in enumerate(names):
            label = encode_mask(np.full(size, i % 3, np.uint8), COLOURS)
            masks.append({"key": name, "mask": label, "height": size[0], "width": size[1], "status": "ok"})
            self.row(f"{key}#{name}", size, i % 3, uri=key, mask=mask)
        self.output.folder.write(mask, mask_table(masks))

    def row(self, key: str, size: tuple[int, int], label: int, *, uri: str, mask: str, confidence: float = 0.9) -> None:
        pixels = [0, 0, 0]
        pixels[label] = size[0] * size[1]
        where = {"uri": self.source.uri_of(uri), "mask_uri": self.output.folder.uri_of(mask)}
        self.rows.append(ok_row(key, confidence, size=size, pixels=pixels, **where))

    def page(self, kind: Kind = "images", classes: dict[str, Any] = CLASSES, **settings: Any) -> Tags:
        if self.rows:
            self.output.commit(self.rows)
        self.rows = []
        self.output.compact()
        config = SegmentConfig.model_validate(settings)
        write_page(self.output, self.source, REPORT | {"input": kind}, classes, config)
        return Tags(self.output.folder.read(PAGE).decode())


def picture(grey: int, size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size[1], size[0]), (grey,) * 3).save(out, "PNG")
    return out.getvalue()


def pictures(page: Tags) -> dict[str, UInt8]:
    """The page's pictures by key."""
    found = {}
    for image in page.of("img"):
        data = str(image["src"]).removeprefix("data:image/jpeg;base64,")
        found[str(image["alt"]).removeprefix("overlay of ")] = np.asarray(
            Image.open(io.BytesIO(base64.b64decode(data)))
        )
    return found


def assert_is_overlay(found: UInt8, grey: int, label: int) -> None:
    expected = overlay(np.full((1, 1, 3), grey, np.uint8), np.full((1, 1), label, np.uint8), COLOURS)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 4  # JPEG's own


@pytest.fixture
def bulk(tmp_path: Path) -> Bulk:
    return Bulk(tmp_path)


def test_the_figures_of_the_report_stand_on_the_page(bulk: Bulk) -> None:
    bulk.add("a.png", 100, 0)
    page = bulk.page()
    for said in (
        "1,234,567 images in the input",
        "1,200,000 images segmented",
        "4,321 images failed",
        "29,826 images done before",
        "17 other objects skipped",
        "This run took 2 h 05 min",
        "160.6 images/s",
        "48.2 megapixels/s",
        "model is the bottleneck",
        "reading and decoding alone 812.5",
        "model alone 161.2",
        "encoding and writing alone not measured",
        "end to end 160.6",
        "0.00519 cost of 1,000 images, at 3 an hour",
        "120 that failed before were not taken again; --retry-failed does. 300 images are left to do.",
        "1 images with a mask (0.0 megapixels), 0 failed",
    ):
        assert said in page.text


def test_class_areas_are_shares_of_all_pixels_and_images_in_which_the_class_occurs(bulk: Bulk) -> None:
    bulk.add("a.png", 100, 0, size=(10, 10))
    bulk.add("b.png", 100, 2, size=(10, 20))
    bulk.add("c.png", 100, 2, size=(10, 50))
    page = bulk.page()
    assert "c 87.50 % 2 a 12.50 % 1 b 0.00 % 0" in page.text
    bars = [e["style"] for e in page.of("i") if "rgb" in str(e.get("style"))]
    assert bars == ["width: 100.00%; background: rgb(240,240,10)", "width: 14.29%; background: rgb(250,10,10)"]


def test_nothing_that_a_stranger_named_becomes_markup(bulk: Bulk) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y>&amp;.png"
    bulk.add("a.png", 100, 0)
    plain = bulk.page()
    bulk.rows.append(failed_row("<b>bad</b>.png", "decode", "<i>not</i> & never", uri=bulk.source.uri_of("bad")))
    name = evil.replace("/", "")
    bulk.add(name, 100, 0)
    marked = [CLASSES["classes"][0] | {"name": "<u>road</u>"}, *CLASSES["classes"][1:]]  # type: ignore[dict-item, list-item, operator]
    page = bulk.page(classes={"classes": marked})
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements}
    assert len(page.of("img")) == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert f"overlay of {name}" in [image["alt"] for image in page.of("img")]
    for said in (name, "<b>bad</b>.png", "<i>not</i> & never", "<u>road</u>"):
        assert said in page.text


def test_the_page_asks_for_nothing_and_forbids_scripts(bulk: Bulk) -> None:
    bulk.add("a.png", 100, 0)
    page = bulk.page()
    links = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href", "srcset")]
    assert links
    assert all(str(link).startswith("data:image/jpeg;base64,") for link in links)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    (policy,) = [m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in str(policy)
    assert "url(" not in bulk.output.folder.read(PAGE).decode()


def test_pictures_are_images_under_their_masks_and_the_same_each_time(bulk: Bulk) -> None:
    for i in range(3 * SAMPLES):
        bulk.add(f"{i % 4}/{i}.png", 5 * i, i % 3, size=(30 + i, 900 if i % 2 else 20))
    page = bulk.page()
    found = pictures(page)
    assert len(found) == SAMPLES
    for key, pixels in found.items():
        number = int(key.split("/")[1].removesuffix(".png"))
        assert max(pixels.shape) <= PICTURE_WIDTH
        assert_is_overlay(pixels, 5 * number, number % 3)
    assert list(found) == sorted(found)
    assert pictures(bulk.page()).keys() == found.keys()


def test_a_picture_that_cannot_be_had_is_left_out(bulk: Bulk) -> None:
    for i in range(6):
        bulk.add(f"{i}.png", 100, 0)
    bulk.source.delete("0.png")
    bulk.source.write("1.png", b"not an image any more")
    bulk.source.write("2.png", picture(100, (41, 60)))
    bulk.output.folder.delete("masks/3.png.png")
    bulk.output.folder.write("masks/4.png.png", b"")
    assert pictures(bulk.page()).keys() == {"5.png"}


@pytest.mark.parametrize("failed", [0, 25])
def test_an_output_without_any_mask_has_a_page(bulk: Bulk, failed: int) -> None:
    bulk.rows = [failed_row(f"{i}.png", "decode", "the object is empty") for i in range(failed)]
    page = bulk.page()
    assert f"0 images with a mask (0.0 megapixels), {failed} failed" in page.text
    assert (
        ("decode 25 the object is empty" in page.text) == ("The first 20 failed, by key" in page.text) == bool(failed)
    )
    assert not page.of("img")


@pytest.mark.parametrize("tar", [True, False])
def test_pictures_out_of_shards_are_those_of_their_rows(bulk: Bulk, tar: bool) -> None:
    names = [f"{i}.jpg" for i in range(20)]
    key = f"a/x#1.{'tar' if tar else 'parquet'}"
    bulk.add_shard(key, names, tar=tar, column="photo")
    found = pictures(bulk.page("shards", image_column="photo"))
    assert len(found) == SAMPLES
    for name, pixels in found.items():
        number = int(name.removeprefix(f"{key}#").removesuffix(".jpg"))
        assert_is_overlay(pixels, 10 * (number + 1), number % 3)


def test_few_shards_are_read_and_others_in_place_of_large_and_lost_ones(
    bulk: Bulk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(8):
        bulk.add_shard(f"{i}.tar", [f"{n}.jpg" for n in range(6)], tar=True)

    def shown() -> list[str]:
        return sorted({key.partition("#")[0] for key in pictures(bulk.page("shards"))})

    deleted, large, kept = shown()
    size = bulk.source.size_of(large)
    assert size is not None
    monkeypatch.setattr(pictures_module, "SHARD_BYTES", size)
    bulk.source.delete(deleted)
    bulk.source.write(large, bulk.source.read(large) + b"\0")
    after = shown()
    assert len(after) == SHARDS_READ
    assert kept in after
    assert not {deleted, large} & set(after)
    bulk.source.write(kept, b"not a tar at all")
    assert shown() == [shard for shard in after if shard != kept]


def test_the_workflow_report_shows_the_same_pictures_and_failures(bulk: Bulk) -> None:
    for i in range(2 * SAMPLES):
        bulk.add(f"{i}.png", 100, 0)
    bulk.rows += [failed_row(f"bad/{i}.png", "decode", "the object is empty") for i in range(3)]
    page = bulk.page()
    bulk.output.folder.write(CLASSES_FILE, json.dumps(CLASSES).encode())
    results = REPORT | {"source": bulk.source.uri, "target": bulk.output.folder.uri}
    facts = bulk_facts(SimpleNamespace(results=results), SegmentConfig())  # type: ignore[arg-type]
    assert [p["picture"] for p in facts["pictures"]] == [image["src"] for image in page.of("img")]
    assert facts["reasons"] == [Reason("decode", "the object is empty", "bad/0.png", 3)]
    assert [(a["name"], a["images"], a["share"]) for a in facts["areas"]] == [
        ("a", 2 * SAMPLES, 1.0),
        ("b", 0, 0.0),
        ("c", 0, 0.0),
    ]
