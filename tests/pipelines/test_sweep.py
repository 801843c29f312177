"""What a sweep tries and what it hands over; the trials themselves need a cluster and are tested elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipelines.config import ModelConfig, Recipe, SearchSpace, SweepConfig, TrainConfig, load_recipe
from pipelines.errors import UsageError
from pipelines.stage import Receipt, StageRun
from pipelines.storage import Folder
from pipelines.sweep import (
    BEST,
    PLOT,
    TABLE,
    Point,
    Trial,
    _write_results,
    best_train,
    log_uniform,
    points,
    sweep,
    table_text,
)
from pipelines.train import train

BASE = TrainConfig.model_validate(
    {
        "model": {"backbone": "vit_tiny_patch16_224", "backbone_args": {"depth": 4}, "width": 24},
        "loss": {"dice": 0.5, "patch": 0.3},
        "lr": 0.0015,
        "steps": 900,
        "batch_size": 6,
        "warmup_steps": 60,
        "runtime": {"workers": 3, "loader_threads": 1},
    }
)
DATASET = "s3://bucket/prepared"
CONFIG = SweepConfig.model_validate({"trials": 40, "steps": 100, "validate_every": 25, "holdout": 0.3})


def test_the_same_recipe_always_tries_the_same_points() -> None:
    assert points(CONFIG, BASE) == points(CONFIG, BASE)
    assert points(CONFIG, BASE) != points(CONFIG.model_copy(update={"seed": 1}), BASE)


def test_more_trials_begin_with_the_same_ones() -> None:
    assert points(CONFIG.model_copy(update={"trials": 12}), BASE) == points(CONFIG, BASE)[:12]


def test_every_trial_has_a_name_of_its_own() -> None:
    found = points(CONFIG, BASE)
    assert len({p.name for p in found}) == len(found) == 40
    assert len({p.config.model_dump_json() for p in found}) == 40


def test_the_first_point_is_the_recipes_own_settings() -> None:
    first = points(CONFIG, BASE)[0]
    assert first.name == "default"
    judged = {"steps": 100, "validate_every": 25, "holdout": 0.3, "warmup_steps": 25}
    runtime = BASE.runtime.model_copy(update={"workers": 1})
    assert first.config == BASE.model_copy(update=judged | {"runtime": runtime})


def test_what_is_not_searched_is_the_recipes_in_every_trial() -> None:
    for point in points(CONFIG, BASE):
        config = point.config
        assert (config.loss.dice, config.loss.ce, config.loss.coarse) == (0.5, 1.0, 0.4)
        assert (config.batch_size, config.seed, config.augment) == (6, 0, BASE.augment)
        assert (config.steps, config.holdout, config.runtime.workers) == (100, 0.3, 1)


def test_values_are_within_their_limits_and_every_choice_happens() -> None:
    space = SearchSpace.model_validate(
        {
            "loss": {"local": (0.1, 1.0), "patch": (0.02, 0.5)},
            "off": 0.3,
            "lr": (1e-4, 1e-2),
            "backbones": [{"backbone": "pvt_v2_b0"}, {"backbone": "vit_tiny_patch16_224"}, {"backbone": "swin_tiny"}],
        }
    )
    found = [p.config for p in points(CONFIG.model_copy(update={"search": space, "trials": 200}), BASE)[1:]]
    for term, (low, high) in space.loss.items():
        values = np.array([getattr(config.loss, term) for config in found])
        on = values[values > 0]
        assert 0.2 < (values == 0).mean() < 0.4, "off happens as often as was asked for"
        assert on.min() >= low
        assert on.max() <= high
        assert 0.35 < (on < np.sqrt(low * high)).mean() < 0.65, "not uniform in the logarithm"
    rates = np.array([config.lr for config in found])
    assert rates.min() >= 1e-4
    assert rates.max() <= 1e-2
    assert 0.35 < (rates < 1e-3).mean() < 0.65
    assert {config.model.backbone for config in found} == {m.backbone for m in space.backbones}


def test_no_term_is_off_when_off_is_impossible() -> None:
    space = SearchSpace(off=0.0)
    found = points(CONFIG.model_copy(update={"search": space}), BASE)[1:]
    assert all(getattr(p.config.loss, term) > 0 for p in found for term in space.loss)


def test_a_draw_has_four_digits_and_both_limits_are_possible() -> None:
    rng = np.random.default_rng(0)
    draws = [log_uniform(rng, (0.02, 0.5)) for _ in range(100)]
    assert all(value == float(f"{value:.4g}") for value in draws)
    assert log_uniform(rng, (0.3, 0.3)) == 0.3


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


# ---------------------------------------------------------------- what is handed over


class Silent:
    """In place of a run in MLflow."""

    def text(self, content: str, name: str) -> None:
        pass


def finished(tmp_path: Path, base: TrainConfig, winner: int, **recipe: Any) -> tuple[Receipt, list[Trial]]:
    """The files of a sweep whose trial of this number has won; the second failed, the third stopped early."""
    config = SweepConfig(trials=4, steps=100)
    trials = [Trial(point, 0.2 + 0.1 * number, 100) for number, point in enumerate(points(config, base))]
    trials[1] = Trial(trials[1].point, float("nan"), 0, "RuntimeError: out of memory")
    trials[2] = Trial(trials[2].point, 0.25, 40)
    run = StageRun(Folder(str(tmp_path / "sweep")), "f" * 64, {}, {"dataset": DATASET})
    whole = Recipe.model_validate(recipe | {"train": base.model_dump()})
    _write_results(run, trials, trials[winner], str(tmp_path / "work"), whole, Silent())  # type: ignore[arg-type]
    return Receipt("sweep", "f" * 64, run.folder.uri, {}, {}, {}, 0.0, 0.0, "d"), trials


def test_the_winner_is_trained_as_the_recipe_says_with_its_model_weights_and_rate(tmp_path: Path) -> None:
    receipt, trials = finished(tmp_path, BASE, 3)
    won = trials[3].point.config
    found = best_train(receipt, BASE)
    assert found == BASE.model_copy(update={"model": won.model, "loss": won.loss, "lr": won.lr, "dataset": DATASET})
    assert (found.steps, found.holdout, found.runtime.workers) == (900, 0.0, 3)


def test_best_yaml_is_a_recipe_that_train_takes_unchanged(tmp_path: Path) -> None:
    receipt, _ = finished(tmp_path, BASE, 3, tracking={"experiment": "streets"})
    recipe = load_recipe(tmp_path / "sweep" / BEST)
    assert recipe.train == best_train(receipt, BASE)
    assert recipe.workspace == str(tmp_path / "work")
    assert recipe.tracking.experiment == "streets"
    assert recipe.sweep is None


@pytest.mark.parametrize("base", [BASE, TrainConfig()], ids=["recipe", "all defaults"])
def test_where_the_default_wins_best_yaml_is_the_recipe_itself(tmp_path: Path, base: TrainConfig) -> None:
    receipt, _ = finished(tmp_path, base, 0)
    expected = base.model_copy(update={"dataset": DATASET})
    assert best_train(receipt, base) == expected
    assert load_recipe(tmp_path / "sweep" / BEST).train == expected


def test_best_yaml_takes_the_runtime_of_who_reads_it(tmp_path: Path) -> None:
    receipt, _ = finished(tmp_path, BASE, 3)
    elsewhere = BASE.model_copy(update={"runtime": BASE.runtime.model_copy(update={"workers": 8})})
    assert best_train(receipt, elsewhere).runtime.workers == 8


def test_best_yaml_states_only_what_differs_from_the_defaults(tmp_path: Path) -> None:
    receipt, _ = finished(tmp_path, TrainConfig(), 3)
    section = yaml.safe_load(receipt.folder.read(BEST))["train"]
    assert set(section) == {"model", "loss", "lr", "dataset"}


def test_best_yaml_holds_no_password_of_a_database(tmp_path: Path) -> None:
    tracking = {"uri": "postgresql://mlflow:hunter2@db/mlflow", "experiment": "streets"}
    receipt, _ = finished(tmp_path, BASE, 3, tracking=tracking)
    assert yaml.safe_load(receipt.folder.read(BEST))["tracking"] == {"experiment": "streets"}


def test_the_table_is_best_first_and_says_why_a_trial_failed() -> None:
    trials = [
        Trial(Point("default", BASE), 0.3, 100),
        Trial(Point("broken", BASE), float("nan"), 0, "RuntimeError: out of memory"),
        Trial(Point("best", BASE.model_copy(update={"model": ModelConfig(backbone="pvt_v2_b0")})), 0.5, 100),
    ]
    lines = table_text(trials).splitlines()
    assert [line.split()[0] for line in lines] == ["trial", "best", "default", "broken"]
    assert "0.5000" in lines[1]
    assert "pvt_v2_b0" in lines[1]
    assert "RuntimeError: out of memory" in lines[3]
    assert len({len(line.rstrip()) for line in lines[1:3]}) == 1, "columns are aligned"


def test_table_and_plot_are_written(tmp_path: Path) -> None:
    receipt, trials = finished(tmp_path, BASE, 3)
    rows = receipt.folder.read(TABLE).decode().splitlines()
    assert len(rows) == 1 + len(trials)
    assert rows[0].startswith("trial,mIoU,steps,backbone,lr,w.")
    assert receipt.folder.read(PLOT).startswith(b"\x89PNG")
