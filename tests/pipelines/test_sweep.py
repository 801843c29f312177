"""What a sweep refuses and what it hands over; that its trials run and survive is in sweeping/test_trials.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config import Recipe, SweepConfig, TrainConfig, load_recipe
from pipelines.dataset import Dataset
from pipelines.errors import UsageError
from pipelines.stage import Receipt, StageRun
from pipelines.storage import Folder
from pipelines.sweep import BEST, FOUND, PAGE, PLOT, TABLE, _results, _write, best_train, sweep, table_text
from pipelines.sweeping.comparison import Comparison, compare, confirmation_points
from pipelines.sweeping.points import points
from pipelines.sweeping.records import FINISHED, Trial
from pipelines.train import train
from tests.pipelines.sweeping.test_points import BASE

DATASET = "s3://bucket/prepared"
CONFIG = SweepConfig(trials=7, steps=100, validate_every=20)


@pytest.mark.parametrize(
    ("stage", "section", "key"),
    [
        (train, {"train": {"batch_size": 2, "runtime": {"workers": 3}}}, "train.runtime.workers"),
        (
            sweep,
            {"train": {"batch_size": 2}, "sweep": {"runtime": {"workers_per_trial": 3}}},
            "sweep.runtime.workers_per_trial",
        ),
    ],
)
def test_a_worker_without_an_image_is_refused_before_it_waits_for_ever(
    tmp_path: Path, stage: Any, section: dict[str, Any], key: str
) -> None:
    with pytest.raises(UsageError, match=f"train.batch_size=2 is less than {key}=3"):
        stage(str(tmp_path), Recipe.model_validate(section))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sweep": {"search": {"loss": {"regoin": [0.1, 1]}}}}, "no loss term regoin"),
        ({"train": {"init_from": "models:/streets@champion"}}, "a sweep does not fine-tune"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_read(
    tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sweep(str(tmp_path), Recipe.model_validate(section))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"confirm_seeds": 1}, "confirm_seeds=1 gives no interval"),
        ({"search": {"lr": [0.01, 0.001]}}, r"lr is a range, low then high, got \[0.01, 0.001\]"),
        ({"search": {"loss": {"local": [1, 0.1]}}}, "loss.local is a range"),
        ({"search": {"loss": {"local": [0, 0.1]}}}, "greater than 0"),
    ],
)
def test_a_space_that_cannot_be_drawn_from_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweepConfig.model_validate(section)


# ---------------------------------------------------------------- what is handed over


def trials_of(base: TrainConfig) -> list[Trial]:
    """A search in which the second trial failed, the third stopped early and the later the better."""
    found = []
    for number, point in enumerate(points(CONFIG, base)):
        curve = tuple((step, 0.1 + 0.05 * number + 0.001 * step) for step in (20, 40, 60, 80, 100))
        found.append(Trial(point, curve, FINISHED))
    found[1] = Trial(found[1].point, (), "failed: RuntimeError: out of <memory>")
    found[2] = Trial(found[2].point, found[2].curve[:2], "stopped early at step 40 by ASHA")
    return found


def confirmed(best: Trial, default: Trial, results: list[float]) -> Comparison:
    what = confirmation_points(best.point, default.point, CONFIG)
    return compare([Trial(p, ((100, miou),), FINISHED) for p, miou in zip(what, results, strict=True)])


BETTER, UNCLEAR = [0.50, 0.40, 0.51, 0.40, 0.52, 0.41], [0.50, 0.40, 0.35, 0.40, 0.52, 0.41]


def finished(
    tmp_path: Path, base: TrainConfig, results: list[float] | None, **recipe: Any
) -> tuple[Receipt, list[Trial], dict[str, Any]]:
    """The files of a sweep whose best and default have had these results on val."""
    trials = trials_of(base)
    best = max(trials, key=lambda trial: trial.rank)
    compared = confirmed(best, trials[0], results) if results is not None else None
    winner = best if compared is None or compared.found_is_better else trials[0]
    run = StageRun(Folder(str(tmp_path / "sweep")), "f" * 64, {})
    manifest = {"name": "streets", "splits": {"train": {"images": 24}, "val": {"images": 8}}}
    dataset = Dataset(Folder(DATASET), manifest)
    whole = Recipe.model_validate(recipe | {"train": base.model_dump()})
    told = _results(run, trials, best, trials[0], winner, compared, dataset, "parent")
    _write(run, str(tmp_path / "work"), whole, CONFIG, trials, best, winner, compared, dataset)
    assert sorted(run.outputs) == sorted([TABLE, PLOT, PAGE, BEST, FOUND])
    return Receipt("sweep", "f" * 64, run.folder.uri, {}, {}, {}, 0.0, 0.0, "d"), trials, told


def test_the_winner_is_trained_as_the_recipe_says_with_its_model_weights_and_rate(tmp_path: Path) -> None:
    receipt, trials, _ = finished(tmp_path, BASE, BETTER)
    won = trials[-1].point.config
    found = best_train(receipt, BASE)
    assert found == BASE.model_copy(update={"model": won.model, "loss": won.loss, "lr": won.lr, "dataset": DATASET})
    assert (found.steps, found.holdout, found.runtime.workers) == (900, 0.0, 3)


def test_best_yaml_is_a_recipe_that_train_takes_unchanged(tmp_path: Path) -> None:
    receipt, *_ = finished(tmp_path, BASE, BETTER, tracking={"experiment": "streets"})
    recipe = load_recipe(tmp_path / "sweep" / BEST)
    assert recipe.train == best_train(receipt, BASE)
    assert recipe.workspace == str(tmp_path / "work")
    assert recipe.tracking.experiment == "streets"
    assert recipe.sweep is None


@pytest.mark.parametrize("base", [BASE, TrainConfig()], ids=["recipe", "all defaults"])
def test_where_the_difference_may_be_chance_best_yaml_is_the_recipe_itself(tmp_path: Path, base: TrainConfig) -> None:
    receipt, trials, told = finished(tmp_path, base, UNCLEAR)
    expected = base.model_copy(update={"dataset": DATASET})
    assert best_train(receipt, base) == expected
    assert load_recipe(tmp_path / "sweep" / BEST).train == expected
    assert (told["best"], told["winner"]) == ("trial-006", "default")
    found = load_recipe(tmp_path / "sweep" / FOUND).train
    assert (found.lr, found.loss) == (trials[-1].point.config.lr, trials[-1].point.config.loss)


def test_without_a_confirmation_the_best_of_the_search_is_taken_and_the_page_says_so(tmp_path: Path) -> None:
    receipt, trials, told = finished(tmp_path, BASE, None)
    assert best_train(receipt, BASE).lr == trials[-1].point.config.lr
    assert told["confirmed"] is None
    assert "Not compared" in receipt.folder.read(PAGE).decode()


def test_best_yaml_takes_the_runtime_of_who_reads_it(tmp_path: Path) -> None:
    receipt, *_ = finished(tmp_path, BASE, BETTER)
    elsewhere = BASE.model_copy(update={"runtime": BASE.runtime.model_copy(update={"workers": 8})})
    assert best_train(receipt, elsewhere).runtime.workers == 8


def test_best_yaml_states_only_what_differs_from_the_defaults(tmp_path: Path) -> None:
    receipt, *_ = finished(tmp_path, TrainConfig(), BETTER)
    section = yaml.safe_load(receipt.folder.read(BEST))["train"]
    assert set(section) <= {"model", "loss", "lr", "dataset"}


def test_no_file_holds_the_password_of_a_database(tmp_path: Path) -> None:
    tracking = {"uri": "postgresql://mlflow:hunter2@db/mlflow", "experiment": "streets"}
    receipt, *_ = finished(tmp_path, BASE, BETTER, tracking=tracking)
    assert yaml.safe_load(receipt.folder.read(BEST))["tracking"] == {"experiment": "streets"}
    assert not any(b"hunter2" in receipt.folder.read(entry.key) for entry in receipt.folder.list())


def test_the_figures_count_what_failed_and_what_was_stopped(tmp_path: Path) -> None:
    *_, told = finished(tmp_path, BASE, BETTER)
    assert (told["trials"], told["failed"], told["stopped_early"]) == (7, 1, 1)
    assert told["default_miou"] == pytest.approx(0.2)
    assert told["confirmed"]["difference"] == pytest.approx(0.1067, abs=1e-4)
    assert told["confirmed"]["low"] > 0


def test_the_table_is_best_first_and_says_how_each_ended() -> None:
    lines = table_text(trials_of(BASE), CONFIG).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["trial", "trial-006", "trial-005"]
    assert [line.split()[0] for line in lines[-3:]] == ["default", "trial-002", "trial-001"]
    assert "0.5000" in lines[1]
    assert "stopped early at step 40 by ASHA" in lines[-2]
    assert "failed: RuntimeError: out of <memory>" in lines[-1]


def test_the_table_as_a_file_has_a_row_for_each_trial(tmp_path: Path) -> None:
    receipt, trials, _ = finished(tmp_path, BASE, BETTER)
    rows = receipt.folder.read(TABLE).decode().splitlines()
    assert len(rows) == 1 + len(trials)
    assert rows[0].startswith("trial,mIoU,steps,ended,backbone,lr,w.")
    assert receipt.folder.read(PLOT).startswith(b"\x89PNG")


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_trials_said(tmp_path: Path) -> None:
    receipt, *_ = finished(tmp_path, BASE, BETTER)
    page = receipt.folder.read(PAGE).decode()
    outside = re.findall(r'(?:src|href)="(?!data:)|url\(|@import|<script|https?://', page)
    assert outside == []
    assert "out of &lt;memory&gt;" in page
    assert page.count('src="data:image/png;base64,') == 4


@pytest.mark.parametrize(("results", "expected"), [(BETTER, "it is better."), (UNCLEAR, "not to be told from chance")])
def test_the_page_states_the_difference_its_interval_and_the_rule_whichever_way_it_falls(
    tmp_path: Path, results: list[float], expected: str
) -> None:
    receipt, _, told = finished(tmp_path, BASE, results)
    page, compared = receipt.folder.read(PAGE).decode(), told["confirmed"]
    assert expected in page
    assert f"95% interval {compared['low']:+.4f} to {compared['high']:+.4f}" in page
    assert "The default stays unless the lower end of the interval is above zero" in page
