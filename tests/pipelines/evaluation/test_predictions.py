"""The masks of a bulk output are judged as the model that made them is, and what cannot be judged has its row."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import evaluate as stage
from pipelines.bulk.commits import MASKS, Output, object_key
from pipelines.bulk.shards import mask_table
from pipelines.config import EvaluateConfig, PrepareConfig, Recipe, SegmentConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.evaluate import PAGE, UNJUDGED, evaluate, read_counts
from pipelines.evaluation.measures import Judge, Measured, together
from pipelines.evaluation.predictions import MaskJudge, Predictions, open_predictions
from pipelines.models import FetchedModel, fetch_model, load_files
from pipelines.prepare import prepare
from pipelines.register import register
from pipelines.segment import segment
from pipelines.stage import Receipt
from pipelines.storage import Folder
from pipelines.workflow import describe, run_workflow
from repsep_model.checkpoint import save_segmentor
from repsep_model.images import encode_mask
from repsep_model.inference import segment_image
from tests.model.tiny import VIT, tiny_segmentor
from tests.pipelines.layout import CLASSES, encoded, ids, picture, write_classes, write_pair

COLOURS = [c["color"] for c in CLASSES]
CLASSES_FILE: dict[str, Any] = {"name": "drawn", "ignore_index": 255, "classes": CLASSES}
SIZES = {"train/a": (24, 32), "val/a": (24, 32), "val/b": (17, 40), "val/night/a": (48, 64), "val/d": (24, 32)}
VAL = ["val/a.jpg", "val/b.jpg", "val/d.jpg", "val/night/a.jpg"]
ONLY_MODELS = ("ece", "retention", "pixel_budget", "flip", "scales")
SAME = ("miou", "macc", "aacc", "fwiou", "mdice", "boundary_miou", "iou", "boundary_iou", "images", "prior_miou")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_classes(folder, name="sizes")
    for number, (key, size) in enumerate(SIZES.items()):
        image = encoded(picture(number, *size), "JPEG")
        write_pair(folder, key, number, image=image, mask=encoded(ids(number, *size)))
    return folder


@pytest.fixture(scope="module")
def dataset(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = PrepareConfig(source=str(source), row_group_rows=2)
    return open_dataset(prepare(str(tmp_path_factory.mktemp("work")), config).results["dataset"])


@pytest.fixture(scope="module")
def model_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_segmentor(tiny_segmentor(VIT, num_classes=len(CLASSES)), folder, classes=CLASSES_FILE)
    return str(folder)


@pytest.fixture
def recipe(tmp_path: Path, dataset: Dataset) -> Recipe:
    return Recipe.model_validate(
        {
            "workspace": str(tmp_path / "work"),
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
            "evaluate": {"dataset": dataset.folder.uri, "overlays": 2},
        }
    )


@pytest.fixture
def masks(dataset: Dataset, model_uri: str, recipe: Recipe) -> dict[str, bytes]:
    """Of every validation image, by the model."""
    with fetch_model(model_uri, recipe.tracking) as fetched:
        model = load_files(fetched.files())
    found = ((key, segment_image(model, image).labels) for key, image, _ in dataset.split("val").share(0, 1))
    return {key: encode_mask(labels, COLOURS) for key, labels in found}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process instead of Ray Data's actors."""

    def judge(config: EvaluateConfig, dataset: Dataset, judged: FetchedModel | Predictions) -> Judge | MaskJudge:
        if isinstance(judged, Predictions):
            return MaskJudge(judged.folder, judged.places, dataset, config)
        return Judge(load_files(judged.files()), dataset, config)

    def measure(config: EvaluateConfig, dataset: Dataset, judged: Any) -> Measured:
        made = judge(config, dataset, judged)
        parts = [made(group) for group in range(dataset.split(config.split).num_groups)]
        return together([Measured.from_bytes(part.to_bytes()) for part in parts])

    monkeypatch.setattr(stage, "measure", measure)
    monkeypatch.setattr(
        stage, "drawn", lambda *arguments: {k: judge(*arguments[:3]).picture(k, g) for k, g in arguments[3].items()}
    )


def result(key: str, where: str | None, *, uri: str | None = None, error: str | None = None) -> dict[str, Any]:
    return {
        "key": key,
        "uri": uri or f"s3://photos/in/{key}",
        "etag": "v1",
        "status": "failed" if error else "ok",
        "stage": "decode" if error else None,
        "error": error,
        "mask_uri": where,
        "model_version": "streets/3",
        "finished_at": datetime.now(UTC),
    }


def claimed(folder: Folder, classes: dict[str, Any] = CLASSES_FILE) -> Output:
    output = Output(folder)
    output.claim({"format": 1, "model": "f" * 64, "source": "s3://photos/in"}, classes, overwrite=False)
    return output


def write_images(folder: Folder, masks: dict[str, bytes], failed: dict[str, str] | None = None) -> Output:
    """A finished output over images."""
    output, rows = claimed(folder), [result(key, None, error=error) for key, error in (failed or {}).items()]
    for key, mask in masks.items():
        where = object_key(MASKS, key, ".png", root=folder.path, local=True)
        folder.write(where, mask)
        rows.append(result(key, folder.uri_of(where)))
    output.commit(rows)
    output.compact()
    return output


def write_shard(folder: Folder, masks: dict[str, bytes]) -> None:
    """A finished output over one shard, in whose last row the image failed."""
    output, shard = claimed(folder), "part#0.parquet"
    rows = [{"key": key, "mask": mask, "status": "ok"} for key, mask in masks.items()]
    rows[-1] |= {"mask": None, "status": "failed", "error": "cut"}
    folder.write(f"{MASKS}/{shard}.parquet", mask_table(rows))
    where = folder.uri_of(f"{MASKS}/{shard}.parquet")
    output.commit(
        [result(f"{shard}#{r['key']}", where, uri=f"s3://photos/in/{shard}", error=r.get("error")) for r in rows]
    )
    output.compact()


@pytest.fixture
def judged(recipe: Recipe, alone: None) -> Callable[..., Receipt]:
    def run(**section: Any) -> Receipt:
        changed = EvaluateConfig.model_validate(recipe.evaluate.model_dump() | section)
        return evaluate(str(recipe.workspace), recipe.model_copy(update={"evaluate": changed}))

    return run


def unjudged(receipt: Receipt) -> dict[str, tuple[str, str]]:
    rows = pq.read_table(io.BytesIO(receipt.folder.read(UNJUDGED))).to_pylist()
    return {row["key"]: (row["kind"], row["reason"]) for row in rows}


def same_counts(ours: Receipt, theirs: Receipt) -> None:
    (keys, counts), (other_keys, other_counts) = read_counts(ours), read_counts(theirs)
    assert keys == other_keys
    for name, values in counts.items():
        assert np.array_equal(values, other_counts[name])
    for table in ("per_image.parquet", "confusion.parquet"):
        assert ours.folder.read(table) == theirs.folder.read(table)
    assert {name: ours.results[name] for name in SAME} == {name: theirs.results[name] for name in SAME}


# ---------------------------------------------------------------- what is the same


def test_masks_have_the_figures_of_the_model_that_made_them(
    judged: Callable[..., Receipt], masks: dict[str, bytes], model_uri: str, tmp_path: Path
) -> None:
    write_images(Folder(str(tmp_path / "out")), {f"images/{key}": mask for key, mask in masks.items()})
    ours, theirs = judged(predictions=str(tmp_path / "out")), judged(model=model_uri)
    same_counts(ours, theirs)
    assert ours.results["unjudged"] == {}
    assert unjudged(ours) == unjudged(theirs) == {}
    overlays = [ours.folder.read(f"overlays/{n:03d}.jpg") for n in (0, 2)]
    assert overlays == [theirs.folder.read(f"overlays/{n:03d}.jpg") for n in (0, 2)]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("kind", ["images", "shards"])
def test_what_segment_wrote_has_the_figures_of_its_model_over_the_shards(
    kind: str, ray_cluster: None, recipe: Recipe, source: Path, dataset: Dataset, model_uri: str, tmp_path: Path
) -> None:
    """The images as files, and the dataset's own shards, through Ray both times."""
    given = source / "images/val" if kind == "images" else f"{dataset.folder.uri}/val"
    section = {"source": str(given), "target": str(tmp_path / "out"), "model": model_uri, "bf16": False}
    segment(str(recipe.workspace), recipe.model_copy(update={"segment": SegmentConfig.model_validate(section)}))
    ours, theirs = (
        evaluate(str(recipe.workspace), recipe, recipe.evaluate.model_copy(update=changed))
        for changed in ({"predictions": str(tmp_path / "out")}, {"model": model_uri})
    )
    assert ours.results["images"] == len(VAL)
    same_counts(ours, theirs)
    assert ours.results["model_digest"] == theirs.results["model_digest"]


def test_what_only_a_model_can_say_is_absent_and_the_page_says_so(
    judged: Callable[..., Receipt], masks: dict[str, bytes], tmp_path: Path
) -> None:
    write_images(Folder(str(tmp_path / "out")), masks)
    receipt = judged(predictions=str(tmp_path / "out"), corruptions="fast", flip=True)
    assert {name: receipt.results.get(name) for name in ONLY_MODELS} == dict.fromkeys(ONLY_MODELS)
    page = receipt.folder.read(PAGE).decode()
    assert "The masks were judged and no model was run: calibration, corrupted images and the separation" in page
    assert str(tmp_path / "out") in page
    for absent in ("<h2>Calibration", "<h2>Corrupted", "<h2>How separate", "Images that are not judged"):
        assert absent not in page
    assert page.count('alt="image, labels and prediction"') == 4, "the worst images are drawn as ever"


def test_the_same_output_is_not_judged_again_until_it_has_new_rows(
    judged: Callable[..., Receipt], masks: dict[str, bytes], tmp_path: Path
) -> None:
    folder = Folder(str(tmp_path / "out"))
    output = write_images(folder, {key: masks[key] for key in VAL[:3]})
    first = judged(predictions=folder.uri)
    assert judged(predictions=folder.uri, flip=True).cached, "a setting without effect is no reason"
    folder.write("masks/late.png", masks[VAL[3]])
    output.commit([result(VAL[3], folder.uri_of("masks/late.png"))])
    output.compact()
    second = judged(predictions=folder.uri)
    assert (first.results["images"], second.results["images"]) == (3, 4)


# ---------------------------------------------------------------- nothing is dropped without a word


def test_an_image_without_a_mask_to_compare_is_recorded_with_its_reason_and_the_others_count(
    judged: Callable[..., Receipt], masks: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(str(tmp_path / "out"))
    whole = {"val/a.jpg": masks["val/a.jpg"], "val/d.jpg": masks["val/b.jpg"], "other/x.jpg": b""}
    write_images(folder, whole, {"val/b.jpg": "the object is empty"})
    receipt = judged(predictions=folder.uri)
    assert unjudged(receipt) == {
        "val/b.jpg": ("failed", "decode: the object is empty"),
        "val/d.jpg": ("size", "its labels have 24 x 32 pixels, its mask 17 x 40"),
        "val/night/a.jpg": ("missing", "the output has no row for it"),
    }
    assert receipt.results["unjudged"] == {"failed": 1, "size": 1, "missing": 1}
    assert read_counts(receipt)[0] == ["val/a.jpg"]
    assert receipt.results["images"] == 1
    assert "(1 images, 1 failed, 1 size, 1 missing)" in describe(receipt)[0]
    assert "val/b.jpg is not judged, failed: decode: the object is empty" in capsys.readouterr().err
    page = receipt.folder.read(PAGE).decode()
    assert "No figure of this page counts these 3 images (1 failed, 1 size, 1 missing)" in page
    assert "its labels have 24 x 32 pixels, its mask 17 x 40" in page


@pytest.mark.parametrize("damage", ["gone", "cut", "another id"])
def test_a_mask_that_cannot_be_used_is_recorded(
    damage: str, judged: Callable[..., Receipt], masks: dict[str, bytes], tmp_path: Path
) -> None:
    folder = Folder(str(tmp_path / "out"))
    write_images(folder, masks)
    where = "masks/val/b.jpg.png"
    if damage == "gone":
        folder.delete(where)
    else:
        full = np.full((17, 40), 7, np.uint8)
        folder.write(where, masks["val/b.jpg"][:60] if damage == "cut" else encode_mask(full, COLOURS))
    ((key, (kind, reason)),) = unjudged(judged(predictions=folder.uri)).items()
    assert (key, kind) == ("val/b.jpg", "unreadable")
    assert ("holds the id 7" if damage == "another id" else where) in reason


def test_masks_of_a_shard_are_found_by_name_and_its_failed_image_is_recorded(
    judged: Callable[..., Receipt], masks: dict[str, bytes], model_uri: str, tmp_path: Path
) -> None:
    folder = Folder(str(tmp_path / "out"))
    write_shard(folder, {key: masks[key] for key in VAL[::-1]})
    receipt = judged(predictions=folder.uri)
    assert unjudged(receipt) == {"val/a.jpg": ("failed", "decode: cut")}
    keys, counts = read_counts(receipt)
    all_keys, all_counts = read_counts(judged(model=model_uri))
    assert keys == all_keys[1:]
    assert np.array_equal(counts["intersection"], all_counts["intersection"][1:])


def test_where_no_image_could_be_judged_it_is_an_error(
    judged: Callable[..., Receipt], masks: dict[str, bytes], tmp_path: Path
) -> None:
    write_images(Folder(str(tmp_path / "out")), {}, dict.fromkeys(VAL, "cut"))
    with pytest.raises(RepsepError, match=r"no image of the split val could be judged; the first, val/a.jpg: decode"):
        judged(predictions=str(tmp_path / "out"))


# ---------------------------------------------------------------- refused before any work


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([CLASSES[0], CLASSES[1] | {"name": "street"}, CLASSES[2]], "id 1 is street and road"),
        ([CLASSES[0] | {"id": 2}, CLASSES[1], CLASSES[2] | {"id": 0}], "id 0 is tree and sky; id 2 is sky and tree"),
        (CLASSES[:2], "id 2 is none and tree"),
    ],
    ids=["name", "order", "fewer"],
)
def test_masks_of_other_classes_are_refused(
    classes: list[dict[str, Any]], said: str, dataset: Dataset, tmp_path: Path
) -> None:
    claimed(Folder(str(tmp_path)), CLASSES_FILE | {"classes": classes})
    with pytest.raises(UsageError) as caught:
        open_predictions(str(tmp_path), dataset, "val")
    assert f"have other classes ({said})" in str(caught.value)


def test_what_is_no_finished_output_of_these_images_is_refused(
    dataset: Dataset, masks: dict[str, bytes], tmp_path: Path
) -> None:
    def refused(name: str) -> str:
        with pytest.raises(UsageError) as caught:
            open_predictions(str(tmp_path / name), dataset, "val")
        return str(caught.value)

    assert "nothing is not an output of `repsep segment`: run.json is missing" in refused("nothing")
    claimed(Folder(str(tmp_path / "begun"))).commit([result("val/a.jpg", None, error="cut")])
    assert "begun is not finished: wait for its `repsep segment`" in refused("begun")
    write_images(Folder(str(tmp_path / "others")), {"train/a.jpg": masks["val/a.jpg"]})
    assert "(1 rows, the first train/a.jpg) belongs to an image of the split val" in refused("others")
    folder = Folder(str(tmp_path / "before"))
    write_images(folder, masks)
    (tmp_path / "before").rename(tmp_path / "after")
    assert "after was written elsewhere: its masks are at" in refused("after")


def test_masks_are_not_registered_nor_part_of_a_workflow(
    judged: Callable[..., Receipt], masks: dict[str, bytes], recipe: Recipe, tmp_path: Path
) -> None:
    write_images(Folder(str(tmp_path / "out")), masks)
    judged(predictions=str(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"judged the masks .*out and no model; run `repsep evaluate` without"):
        register(str(recipe.workspace), recipe)
    section = recipe.evaluate.model_copy(update={"predictions": str(tmp_path / "out")})
    with pytest.raises(UsageError, match="leave it out of a workflow's recipe"):
        next(run_workflow(recipe.model_copy(update={"evaluate": section})))


def test_a_model_and_masks_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="model and predictions are both given"):
        EvaluateConfig(model="models:/streets@champion", predictions="s3://out")


def test_the_columns_of_what_is_not_judged_are_there_when_it_is_empty(
    judged: Callable[..., Receipt], masks: dict[str, bytes], tmp_path: Path
) -> None:
    write_images(Folder(str(tmp_path / "out")), masks)
    table = pq.read_table(io.BytesIO(judged(predictions=str(tmp_path / "out")).folder.read(UNJUDGED)))
    assert table.schema.equals(pa.schema([(name, pa.string()) for name in ("key", "kind", "reason")]))
