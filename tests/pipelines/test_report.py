"""The report says what receipts and files say, does nothing else, and leaves out what did not run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.cli import repsep
from pipelines import evaluate as evaluate_stage
from pipelines import tracking
from pipelines.bulk.commits import CLASSES as CLASSES_FILE
from pipelines.config import EvaluateConfig, Recipe, Section, TrackingConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import UsageError
from pipelines.evaluate import evaluate
from pipelines.evaluation.measures import CLEAN, Judge, together
from pipelines.models import load_files
from pipelines.pages import as_text
from pipelines.prepare import prepare
from pipelines.register import register
from pipelines.report import latest_receipts, report
from pipelines.reporting.card import description_of
from pipelines.reporting.facts import gate_facts
from pipelines.reporting.scores import class_scores, confusions_of, robustness
from pipelines.stage import Receipt, StageRun, run_stage
from repsep_model.checkpoint import save_segmentor
from tests.browser import look_at
from tests.model.tiny import VIT, tiny_segmentor
from tests.pipelines.bulk.test_page import REPORT, Bulk, Tags, failed_row
from tests.pipelines.conftest import TINY_MODEL
from tests.pipelines.layout import CLASSES, encoded, ids, picture, write_classes, write_pair
from tests.ports import free_ports

HOSTILE = "<script>alert(1)</script>"
NAMES = ["sky", "road", HOSTILE]
KEYS = ["train/a", "train/b", "train/c", "train/d", "val/a", "val/b", "val/c", "val/d"]
STAGES = ["prepare", "sweep", "train", "evaluate", "register", "segment"]
ABSENT = {
    "prepare": "Absent: no dataset was prepared",
    "sweep": "Absent: no sweep was run",
    "train": "Absent: nothing was trained",
    "evaluate": "Absent: no model was evaluated",
    "register": "Absent: no model was registered",
    "segment": "Absent: nothing was segmented in bulk",
}


class Settings(Section):
    """Stands for the section of a stage that these tests do not run."""

    model: dict[str, Any] = {"backbone": "vit_tiny_patch16_224", "pretrained": False, "separation": "region"} | {
        "cross_attention": 1,
        "local_pathway": True,
    }
    batch_size: int = 4
    lr: float = 0.001
    seed: int = 0
    init_from: str | None = None


class Story:
    """A workflow in which two models were trained, the second is judged against the first, and a bucket labelled.

    Data, evaluation, gate and the bulk run's files are the stages' own; the sweep and the training, which need a
    cluster, are told: their receipts and files are what those stages write.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.workspace = root, str(root / "work")
        self.source = root / "source"
        write_classes(self.source, [c | {"name": n} for c, n in zip(CLASSES, NAMES, strict=True)], name="drawn & more")
        for number, key in enumerate(KEYS):
            write_pair(self.source, key, number, image=encoded(picture(number), "JPEG"), mask=encoded(ids(number)))
        write_pair(self.source, "train/broken", 9, mask=b"no picture")
        self.recipe = Recipe.model_validate(
            {
                "workspace": self.workspace,
                "tracking": {"uri": f"sqlite:///{root}/mlflow.db"},
                "prepare": {"source": str(self.source), "max_reject_rate": 0.2, "row_group_rows": 2},
                "evaluate": {"corruptions": "fast", "overlays": 2},
                "register": {"name": "streets", "bootstrap": 100},
            }
        )
        self.prepared = prepare(self.workspace, self.recipe.prepare)
        self.dataset = open_dataset(self.prepared.results["dataset"])
        self.receipts: list[Receipt] = []
        for seed in (0, 1):
            train = self.trained(seed)
            judged = evaluate(self.workspace, self.recipe)
            gate = register(self.workspace, self.recipe)
            self.receipts = [self.prepared, self._swept(), train, judged, gate, self._segmented()]

    def of(self, stage: str) -> Receipt:
        return next(receipt for receipt in self.receipts if receipt.stage == stage)

    def told(self, *stages: str) -> tuple[str, str]:
        """Page and card of these stages alone."""
        done = report(self.workspace, self.recipe, [self.of(stage) for stage in stages], "tale")
        return tuple(done.folder.read(name).decode() for name in ("index.html", "model_card.md"))  # type: ignore[return-value]

    def _stage(self, name: str, inputs: dict[str, str], results: Any) -> Receipt:
        def body(run: StageRun) -> None:
            run.results = results(run)

        return run_stage(
            name, workspace=self.workspace, config=Settings(), inputs=inputs, packages=("repsep_model",), body=body
        )

    def trained(self, seed: int) -> Receipt:
        run_id = tracking.start_run(self.recipe.tracking, "train")
        logger = tracking.RunLogger(tracking.tracking_uri(self.recipe.tracking), run_id)
        for step in (5, 10, 15, 20):
            logger.metrics({"loss": 3 / step, "loss/ce": 2 / step, "loss/patch": 1 / step, "lr": 0.01 / step}, step)
            logger.metrics({"val/miou": step / 50, "images_per_s": 10.0 + step, "data_wait_share": 0.01}, step)

        def results(run: StageRun) -> dict[str, Any]:
            folder = self.root / f"model-{seed}"
            model = tiny_segmentor(VIT, num_classes=len(NAMES), seed=seed)
            save_segmentor(model, folder, classes=self.dataset.classes_file)
            return {
                "model": str(folder),
                "mlflow_run": run_id,
                "steps": 20,
                "miou": 0.4321,
                "best_step": 20,
                "parameters_millions": 1.23,
                "images_per_s": 17.5,
                "data_wait_share": 0.0123,
                "workers": 3,
                "train_seconds": 61.5,
            }

        return self._stage("train", {"dataset": self.dataset.digest, "seed": str(seed)}, results)

    def _swept(self) -> Receipt:
        def results(run: StageRun) -> dict[str, Any]:
            table = "trial,mIoU,steps,ended,w.patch\ntrial-001,0.2222,8,stopped,0.5\n"
            run.folder.write(
                "trials.csv", f"{table}trial-002,,0,failed: {HOSTILE},0\ndefault,0.3333,24,finished,0.1\n".encode()
            )
            verdict = "The best of the search is 0.0123 mIoU above the default on val, 95% interval -0.0100 to +0.0346."
            pairs = [{"seed": 1, "best": 0.4, "default": 0.39}, {"seed": 2, "best": 0.41, "default": 0.395}]
            compared = {"pairs": pairs, "errors": [], "difference": 0.0123, "low": -0.01, "high": 0.0346}
            return {
                "table": run.folder.uri_of("trials.csv"),
                "page": run.folder.uri_of("index.html"),
                "trials": 3,
                "stopped_early": 1,
                "failed": 1,
                "best": "trial-001",
                "winner": "default",
                "best_miou": 0.2222,
                "default_miou": 0.3333,
                "confirmed": compared | {"verdict": verdict},
                "importances": [{"name": "w.patch", "share": 0.61, "p": 0.031, "how": "less is better"}],
            }

        return self._stage("sweep", {"dataset": self.dataset.digest}, results)

    def _segmented(self) -> Receipt:
        bulk = Bulk(self.root / "bulk")
        bulk.output.folder.write(CLASSES_FILE, json.dumps(self.dataset.classes_file).encode())
        for number in range(3):
            bulk.add(f"{number}.png", 100, number % 2)
        bulk.rows.append(failed_row(f"bad/{HOSTILE}.png", "decode", "the object is empty"))
        bulk.output.commit(bulk.rows)
        bulk.output.compact()
        where = {"source": bulk.source.uri, "target": bulk.output.folder.uri, "model": "streets/1", "rows": 4}
        return self._stage("segment", {}, lambda run: REPORT | where | {"failed_rows": 1})


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    def judge(config: EvaluateConfig, dataset: Dataset, model: Any) -> Judge:
        return Judge(load_files(model.files()), dataset, config)

    def measure(config: EvaluateConfig, dataset: Dataset, model: Any) -> Any:
        judged = judge(config, dataset, model)
        return together([judged(group) for group in range(judged.split.num_groups)])

    def drawn(config: EvaluateConfig, dataset: Dataset, model: Any, keys: dict[str, int]) -> dict[str, bytes]:
        return {key: judge(config, dataset, model).picture(key, group) for key, group in keys.items()}

    with pytest.MonkeyPatch.context() as patch:  # in this process instead of Ray Data's actors
        patch.setattr(evaluate_stage, "measure", measure)
        patch.setattr(evaluate_stage, "drawn", drawn)
        yield Story(tmp_path_factory.mktemp("story"))


@pytest.fixture(scope="module")
def told(story: Story) -> tuple[str, str]:
    return story.told(*STAGES)


@pytest.fixture(scope="module")
def page(told: tuple[str, str]) -> Tags:
    return Tags(told[0])


@pytest.fixture(scope="module")
def card(told: tuple[str, str]) -> str:
    return told[1]


def counts_of(receipt: Receipt, column: str) -> Any:
    with receipt.folder.open("per_image.parquet") as handle:
        return np.array(pq.read_table(handle)[column].to_pylist(), np.int64)


# ---------------------------------------------------------------- figures


def test_the_data_set_card_says_what_dataset_json_says(story: Story, page: Tags) -> None:
    manifest = story.dataset.manifest
    for name, split in manifest["splits"].items():
        assert f"{name} {split['images']} {sum(split['pixels']):,}" in page.text
    train, val = (np.array(manifest["splits"][name]["pixels"]) for name in ("train", "val"))
    for k, name in enumerate(NAMES):
        assert f"{name} {100 * train[k] / train.sum():.1f} % {100 * val[k] / val.sum():.1f} %" in page.text
    assert story.dataset.digest in page.text
    assert "masks/train/broken.png" in page.text
    assert "licence not known" in page.text


def test_each_class_has_its_own_iou_and_pixels_also_where_the_receipt_was_read_again(story: Story) -> None:
    """JSON receipts have keys by name, ids have another order."""
    fresh = story.of("evaluate")
    again = evaluate(story.workspace, story.recipe)
    assert again.cached
    assert list(again.results["iou"]) != NAMES, "otherwise this shows nothing"
    intersection, predicted, labelled = (counts_of(fresh, c).sum(0) for c in ("intersection", "predicted", "labelled"))
    expected = {
        name: (intersection[k] / (predicted[k] + labelled[k] - intersection[k]), int(labelled[k]))
        for k, name in enumerate(NAMES)
    }
    for receipt in (fresh, again):
        names, _ = confusions_of(receipt)
        found = {row["name"]: (row["iou"], row["pixels"]) for row in class_scores(receipt, names, {})}
        assert set(found) == set(expected)
        for name, (iou, pixels) in expected.items():
            assert found[name] == (pytest.approx(iou, abs=1e-6), pixels)


def test_the_evaluation_on_the_page_is_that_of_the_receipt(story: Story, page: Tags) -> None:
    results = story.of("evaluate").results
    for value, said in (
        ("miou", f"mIoU over {results['classes_scored']} classes, 4 images"),
        ("boundary_miou", "boundary mIoU"),
        ("aacc", "pixel accuracy (aAcc)"),
        ("macc", "mean class accuracy"),
        ("ece", "calibration error (ECE)"),
        ("prior_miou", "mIoU of the prior"),
    ):
        assert f"{results[value]:.4f} {said}" in page.text
    labelled = counts_of(story.of("evaluate"), "labelled")
    for k, name in enumerate(NAMES):
        row = f"{name} {results['iou'][name]:.4f} {results['boundary_iou'][name]:.4f}"
        assert f"{row} {labelled[:, k].sum():,} {(labelled[:, k] > 0).sum()}" in page.text
    for worst in results["worst"]:
        assert f"{worst['key']}: {worst['miou']:.3f}" in page.text


def test_retention_and_miou_under_corruption_follow_from_the_confusion_matrices(story: Story, page: Tags) -> None:
    receipt = story.of("evaluate")
    _, confusions = confusions_of(receipt)
    found = robustness(receipt, confusions)
    assert found is not None
    for row in found["rows"]:
        for severity, miou in zip(found["severities"], row["mious"], strict=True):
            matrix = confusions[row["name"], severity]
            union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
            assert miou == pytest.approx(np.mean(np.diag(matrix)[union > 0] / union[union > 0]))
        said = " ".join(f"{miou:.3f}" for miou in [receipt.results["miou"], *row["mious"]])
        assert f"{row['name'].replace('_', ' ')} {100 * row['retention']:.1f} % {said}" in page.text
    for name, kept in receipt.results["retention_by_category"].items():
        assert f"{name} {100 * kept:.1f} %" in page.text


def test_the_clean_matrix_is_that_of_the_per_image_counts(story: Story) -> None:
    _, confusions = confusions_of(story.of("evaluate"))
    assert np.array_equal(np.diag(confusions[CLEAN]), counts_of(story.of("evaluate"), "intersection").sum(0))
    assert np.array_equal(confusions[CLEAN].sum(1), counts_of(story.of("evaluate"), "labelled").sum(0))


def test_the_gate_says_difference_interval_conditions_and_classes(story: Story, page: Tags) -> None:
    results = story.of("register").results
    figures = results["figures"]
    assert results["champion"] == "1"
    assert f"streets version 2 is {results['alias']}: {results['reason']}" in page.text
    assert "streets version 2 against version 1" in page.text
    assert f"{figures['difference']:+.4f} difference" in page.text
    assert f"{figures['low']:+.3f} to {figures['high']:+.3f} 95 % interval" in page.text
    for check in results["checks"]:
        assert f"{check['asked']} {check['found']} {'met' if check['passed'] else 'not met'}" in page.text
    rows = gate_facts(story.of("register"))["classes"]
    assert [row["difference"] for row in rows] == sorted(row["difference"] for row in results["classes"])
    for row in rows:
        assert (
            f"{row['name']} {row['ours']:.4f} {row['theirs']:.4f} {row['difference']:+.4f} {row['pixels']:,}"
            in page.text
        )


def test_training_sweep_and_bulk_run_are_told_with_their_figures(page: Tags) -> None:
    for said in (
        "20 steps of 4 images",
        "61.5 s of training",
        "17.5 images/s",
        "1.2 % of the time waiting for data",
        "3 workers at the end",
        "0.432 best mIoU in the loop, step 20",
        "+0.0123 best minus default, mIoU on val",
        "-0.010 to +0.035 95 % interval, 2 seeds",
        "w.patch 61 % 0.031 less is better",
        "not with the model of this report",
        "1,200,000 images segmented in 2 h 05 min",
        "the bottleneck is the model",
        f"decode 1 the object is empty bad/{HOSTILE}.png",
        "sky 66.67 % 2",
        "road 33.33 % 1",
    ):
        assert said in page.text
    assert page.text.index("default 0.3333") < page.text.index("trial-001 0.2222") < page.text.index("trial-002")
    titles = [str(image["alt"]) for image in page.of("img")]
    assert [title.removesuffix(" over steps") for title in titles if title.endswith("over steps")] == [
        "mIoU on validation",
        "Loss",
        "Terms of the loss, before their weights",
        "Learning rate",
        "Images per second",
        "Share of the time spent waiting for data",
    ]


def test_provenance_holds_the_fingerprint_and_digest_of_every_stage(story: Story, page: Tags) -> None:
    for receipt in story.receipts:
        assert f"{receipt.stage} {receipt.seconds:,.1f} {receipt.fingerprint[:12]} {receipt.digest[:16]}" in page.text
    assert story.of("evaluate").results["model_digest"] in page.text


# ---------------------------------------------------------------- what is not there, and what may not be


@pytest.mark.parametrize(
    "left", [*([stage] for stage in STAGES), STAGES, []], ids=lambda left: "+".join(left) or "none"
)
def test_a_stage_that_did_not_run_is_absent_in_one_line(story: Story, left: list[str]) -> None:
    page, card = story.told(*(stage for stage in STAGES if stage not in left))
    text = Tags(page).text
    for stage, said in ABSENT.items():
        assert (said in text) == (stage in left)
    assert not re.search(r"<section[^>]*><h2>[^<]*</h2>\s*</section>", page), "an empty section"
    assert ("Not registered" in card) == ("register" in left)


def test_without_corruptions_the_card_says_that_nothing_is_known_of_them(story: Story) -> None:
    plain = story.recipe.model_copy(update={"evaluate": EvaluateConfig(overlays=0)})
    judged = evaluate(story.workspace, plain)
    done = report(story.workspace, plain, [story.prepared, judged])
    assert "Absent: not measured." in Tags(done.folder.read("index.html").decode()).text
    card = done.folder.read("model_card.md").decode()
    assert "How it does on noisy, blurred or badly lit images was not measured" in card


def test_the_page_asks_for_nothing_outside_it_and_runs_nothing(page: Tags) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert "url(" not in str(attributes.get("style"))
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "base"}
    assert HOSTILE in page.text, "the name is there, as text"


def test_in_the_card_a_name_is_text_too(card: str) -> None:
    assert "<script" not in card
    assert "&lt;script&gt;" in card
    assert as_text("a|b *c* [d](http://e) `f`\n# g") == r"a\|b \*c\* \[d\](http://e) \`f\` \# g"


# ---------------------------------------------------------------- the card


def test_the_card_has_the_figures_the_digests_and_what_is_not_known(story: Story, card: str) -> None:
    results = story.of("evaluate").results
    assert f"On 4 images of the split val, evaluation digest `{results['evaluation']}`" in card
    assert f"| mIoU over {results['classes_scored']} classes | {results['miou']:.4f} |" in card
    assert f"| sky | {results['iou']['sky']:.4f} | {results['boundary_iou']['sky']:.4f} |" in card
    assert "Licence: not known: fill in" in card
    assert "--model models:/streets/2" in card
    assert story.dataset.digest in card
    assert f"`{results['model_digest']}`" in card
    assert "\n\n\n" not in card


def test_limitations_follow_from_the_figures(story: Story, card: str) -> None:
    results = story.of("evaluate").results
    low = sorted((name for name in NAMES if results["iou"][name] < 0.5), key=lambda name: results["iou"][name])
    assert low, "random weights are no good"
    told = re.search(r"Classes with an IoU under 0\.5: (.*)\.", card)
    assert told is not None
    assert [part.rpartition(" ")[0] for part in told[1].split(", ")] == [
        name.replace("<", "&lt;").replace(">", "&gt;") for name in low
    ]
    assert "The figures rest on 4 images, fewer than 100" in card


def test_the_card_goes_with_the_registered_version(story: Story) -> None:
    _, card = story.told("prepare", "train", "evaluate", "register")
    registered = story.of("register").results
    client = tracking.client_for(tracking.tracking_uri(story.recipe.tracking))
    version = client.get_model_version("streets", registered["version"])
    assert version.description == card
    artifact = client.download_artifacts(registered["mlflow_run"], "card/streets-2.md")
    assert Path(artifact).read_text() == card


def test_a_card_that_mlflow_could_not_take_is_sent_when_the_report_is_called_again(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = story.recipe.model_copy(update={"tracking": TrackingConfig(uri=f"http://127.0.0.1:{free_ports(1)[0]}")})
    done = report(story.workspace, away, [story.of("evaluate"), story.of("register")])
    card = done.folder.read("model_card.md").decode()
    client = tracking.client_for(tracking.tracking_uri(story.recipe.tracking))
    assert client.get_model_version("streets", "2").description != card
    assert report(story.workspace, story.recipe, [story.of("evaluate"), story.of("register")]).cached
    assert client.get_model_version("streets", "2").description == card
    kept = tracking.read_artifact(
        story.recipe.tracking, story.of("register").results["mlflow_run"], "card/streets-2.md"
    )
    assert kept.decode() == card


def test_a_description_that_is_too_long_is_cut_between_sections() -> None:
    card = "# Model card\n\nfirst\n\n## One\n\n" + "1" * 50 + "\n\n## Two\n\n" + "2" * 200 + "\n"
    assert description_of(card, "card/a-1.md", len(card)) == card
    cut = description_of(card, "card/a-1.md", 200)
    assert len(cut) <= 200
    assert cut.startswith("# Model card\n\nfirst\n\n## One\n\n" + "1" * 50 + "\n\nThe whole card is")
    assert "`card/a-1.md`" in cut


def test_a_licence_that_classes_json_names_stands_on_page_and_card(tmp_path: Path, story: Story) -> None:
    write_classes(tmp_path / "source", name="free", licence="CC BY 4.0")
    for number, key in enumerate(KEYS):
        write_pair(tmp_path / "source", key, number)
    config = story.recipe.prepare.model_copy(update={"source": str(tmp_path / "source")})
    done = report(story.workspace, story.recipe, [prepare(str(tmp_path / "work"), config)])
    assert "licence CC BY 4.0" in Tags(done.folder.read("index.html").decode()).text
    assert "Licence: CC BY 4.0" in done.folder.read("model_card.md").decode()


# ---------------------------------------------------------------- of stages that were run one by one


def test_the_command_makes_the_report_that_a_workflow_ends_with(story: Story, tmp_path: Path) -> None:
    evaluate(story.workspace, story.recipe)  # the latest again: another test here judged in another way
    ended_with = report(story.workspace, story.recipe, story.receipts, "tale")
    recipe = tmp_path / "tale.yaml"
    recipe.write_text(story.recipe.model_dump_json(by_alias=True, exclude_defaults=True))
    done = CliRunner().invoke(repsep, ["report", "--config", str(recipe), "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["cached"]
    assert made["digest"] == ended_with.digest


def test_what_does_not_belong_to_the_newer_stages_is_left_out(
    story: Story, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(story.workspace, tmp_path / "work")
    story.workspace, before = str(tmp_path / "work"), story.workspace
    try:
        story.trained(2)
        found = latest_receipts(story.workspace)
    finally:
        story.workspace = before
    assert [receipt.stage for receipt in found] == ["prepare", "sweep", "train", "segment"]
    told = capsys.readouterr().err
    assert "the latest evaluate is left out: the latest train is newer and does not belong to it" in told
    assert "the latest register is left out: it was for another evaluation" in told


def test_data_that_were_prepared_anew_are_no_data_of_the_model_before(story: Story, tmp_path: Path) -> None:
    shutil.copytree(story.workspace, tmp_path / "work")
    prepare(str(tmp_path / "work"), story.recipe.prepare.model_copy(update={"row_group_rows": 1}))
    assert [receipt.stage for receipt in latest_receipts(str(tmp_path / "work"))] == ["prepare", "segment"]


def test_where_nothing_was_done_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run `repsep workflow`"):
        latest_receipts(str(tmp_path))


# ---------------------------------------------------------------- in a browser


@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_finds_no_error_no_request_and_no_overflow(story: Story, told: tuple[str, str], width: int) -> None:
    file = story.root / "page.html"
    file.write_text(told[0])
    seen = look_at(file, width)
    assert seen.errors == seen.requests == seen.broken == []
    assert seen.images == len(Tags(told[0]).of("img"))
    assert seen.overflow <= 0


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("<script>alert(1)</script>", "errors"),
        ("<script>throw new Error('x')</script>", "errors"),
        ("<img alt='a' src='data:image/png;base64,AAAA'>", "broken"),
        ("<img alt='a' src='file:///nowhere.png'>", "requests"),
        ("<p style='width: 3000px'>a</p>", "overflow"),
    ],
)
def test_the_look_in_the_browser_sees_what_is_wrong(tmp_path: Path, body: str, what: str) -> None:
    (tmp_path / "page.html").write_text(f"<!doctype html><link rel=icon href='data:,'>{body}")
    assert getattr(look_at(tmp_path / "page.html", 420), what)


@pytest.mark.slow
def test_the_page_of_the_demo_is_without_fault_in_a_browser(scenes: Path, tmp_path: Path) -> None:
    steps = [
        "train.steps=8",
        "train.validate_every=4",
        f"train.model={json.dumps(TINY_MODEL)}",
        "evaluate.corruptions=fast",
    ]
    command = [str(Path(sys.executable).parent / "repsep"), "demo", "--data", str(scenes), "--folder", str(tmp_path)]
    command += [part for step in steps for part in ("--set", step)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    file = Path(done.stdout.split("report page:")[1].strip())
    text = Tags(file.read_text()).text
    assert [stage for stage, said in ABSENT.items() if said in text] == ["sweep"]
    assert "Recipe demo" in text
    for width in (1280, 420):
        seen = look_at(file, width)
        assert seen.errors == seen.requests == seen.broken == []
        assert seen.images >= 20
        assert seen.overflow <= 0
