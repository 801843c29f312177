"""What a sweep tries."""

from __future__ import annotations

import pickle

import numpy as np
import optuna
import pytest
from ray.tune.search.optuna import OptunaSearch

from pipelines.config import SearchSpace, SweepConfig, TrainConfig
from pipelines.errors import UsageError
from pipelines.sweeping.points import Point, TpeSpace, check_space, models_of, points, searched
from repsep_model.losses import term_names

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
CONFIG = SweepConfig.model_validate({"trials": 40, "steps": 100, "validate_every": 25, "holdout": 0.3})
SPACE = SearchSpace.model_validate(
    {
        "loss": {"local": (0.1, 1.0), "patch": (0.02, 0.5)},
        "off": 0.3,
        "lr": (1e-4, 1e-2),
        "backbones": [{"backbone": "pvt_v2_b0"}, {"backbone": "vit_tiny_patch16_224"}, {"backbone": "swin_tiny"}],
        "separation": ["none", "local", "region"],
        "cross_attention": [0, 1, 2],
    }
)


def with_space(trials: int, space: SearchSpace = SPACE) -> SweepConfig:
    return CONFIG.model_copy(update={"search": space, "trials": trials})


def test_the_same_recipe_always_tries_the_same_points() -> None:
    assert points(CONFIG, BASE) == points(CONFIG, BASE)
    assert points(CONFIG, BASE) != points(CONFIG.model_copy(update={"seed": 1}), BASE)


def test_more_trials_begin_with_the_same_ones() -> None:
    assert points(CONFIG.model_copy(update={"trials": 12}), BASE) == points(CONFIG, BASE)[:12]


def test_every_trial_has_a_name_and_files_of_its_own() -> None:
    found = points(CONFIG, BASE)
    assert len({p.name for p in found}) == len({p.key for p in found}) == 40
    assert len({p.config.model_dump_json() for p in found}) == 40


def test_another_point_under_the_same_name_has_other_files() -> None:
    point = points(CONFIG, BASE)[3]
    assert Point(point.name, point.config.model_copy(update={"lr": 0.5})).key != point.key
    elsewhere = point.config.runtime.model_copy(update={"loader_threads": 7})
    assert Point(point.name, point.config.model_copy(update={"runtime": elsewhere})).key == point.key


def test_a_point_survives_its_way_through_json() -> None:
    point = points(with_space(3), BASE)[2]
    assert Point.from_dict(point.to_dict()) == point


def test_the_first_point_is_the_recipes_own_settings() -> None:
    first = points(CONFIG, BASE)[0]
    assert first.name == "default"
    judged = {"steps": 100, "validate_every": 25, "holdout": 0.3, "warmup_steps": 25}
    runtime = BASE.runtime.model_copy(update={"workers": 1, "max_failures": 0})
    assert first.config == BASE.model_copy(update=judged | {"runtime": runtime})


def test_what_is_not_searched_is_the_recipes_in_every_trial() -> None:
    for point in points(CONFIG, BASE):
        config = point.config
        assert (config.loss.dice, config.loss.ce, config.loss.coarse) == (0.5, 1.0, 0.4)
        assert (config.batch_size, config.seed, config.augment) == (6, 0, BASE.augment)
        assert (config.steps, config.holdout, config.runtime.workers) == (100, 0.3, 1)


def test_values_are_within_their_limits_and_every_choice_happens() -> None:
    found = [p.config for p in points(with_space(200), BASE)[1:]]
    for term, (low, high) in SPACE.loss.items():
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
    kinds = {(c.model.backbone, c.model.separation, c.model.cross_attention) for c in found}
    assert len(kinds) == 3 * 3 * 3
    assert kinds == {(m.backbone, m.separation, m.cross_attention) for m in models_of(SPACE)}


def test_a_space_without_variants_keeps_those_of_each_model() -> None:
    space = SPACE.model_copy(update={"separation": [], "cross_attention": []})
    assert models_of(space) == list(space.backbones)
    assert {p.config.model.separation for p in points(with_space(9, space), BASE)[1:]} == {"region"}


def test_no_term_is_off_when_off_is_impossible() -> None:
    found = points(with_space(40, SPACE.model_copy(update={"off": 0.0})), BASE)[1:]
    assert all(getattr(p.config.loss, term) > 0 for p in found for term in SPACE.loss)


def test_drawn_numbers_have_four_digits() -> None:
    for point in points(with_space(30), BASE)[1:]:
        values = [point.config.lr, *(getattr(point.config.loss, term) for term in SPACE.loss)]
        assert all(value == float(f"{value:.4g}") for value in values)


def test_what_is_searched_is_named_and_nothing_else() -> None:
    point = points(with_space(2), BASE)[1]
    found = searched(point.config, SPACE)
    assert list(found) == ["backbone", "lr", "separation", "cross-attention layers", "w.local", "w.patch"]
    assert found["w.local"] == point.config.loss.local
    assert searched(BASE, SPACE)["backbone"] == "vit_tiny_patch16_224 (depth=4)"


def test_a_loss_term_that_there_is_not_is_refused_by_name() -> None:
    check_space(SPACE, term_names())
    with pytest.raises(UsageError, match=r"no loss term regoin; known: .*region"):
        check_space(SearchSpace.model_validate({"loss": {"regoin": (0.1, 1)}}), term_names())


# ---------------------------------------------------------------- Optuna's TPE


def proposed(search: OptunaSearch, number: int) -> list[Point]:
    """So many of its proposals, each told that a smaller rate is better."""
    found = []
    for trial in range(number):
        point = Point.from_dict(search.suggest(f"t{trial}")["point"])
        search.on_trial_complete(f"t{trial}", {"miou": -abs(np.log(point.config.lr / 2e-4))})
        found.append(point)
    return found


@pytest.fixture
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.usefixtures("quiet")
def test_tpe_tries_the_default_first_then_points_of_the_space() -> None:
    found = proposed(OptunaSearch(TpeSpace(with_space(12), BASE), metric="miou", mode="max", seed=0), 12)
    assert [p.name for p in found[:3]] == ["default", "trial-001", "trial-002"]
    assert found[0] == points(with_space(1), BASE)[0]
    for point in found[1:]:
        assert 1e-4 <= point.config.lr <= 1e-2
        assert point.config.model in models_of(SPACE)
        for term, (low, high) in SPACE.loss.items():
            assert getattr(point.config.loss, term) == 0 or low <= getattr(point.config.loss, term) <= high


@pytest.mark.usefixtures("quiet")
def test_tpe_learns_where_random_points_do_not() -> None:
    wide = SPACE.model_copy(update={"lr": (1e-6, 1.0)})
    learned = proposed(OptunaSearch(TpeSpace(with_space(60, wide), BASE), metric="miou", mode="max", seed=0), 60)
    drawn = points(with_space(60, wide), BASE)

    def mean_miss(found: list[Point]) -> float:
        return float(np.mean([abs(np.log10(p.config.lr / 2e-4)) for p in found[-30:]]))

    assert mean_miss(learned) < 0.6 * mean_miss(drawn)


@pytest.mark.usefixtures("quiet")
def test_the_search_can_be_written_to_a_file_and_goes_on_where_it_was() -> None:
    search = OptunaSearch(TpeSpace(with_space(9), BASE), metric="miou", mode="max", seed=0)
    proposed(search, 5)
    again = pickle.loads(pickle.dumps(search))  # noqa: S301 # what Tune itself does
    assert again.suggest("x")["point"]["name"] == "trial-005"
