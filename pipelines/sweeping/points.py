"""What a sweep tries: the recipe's own settings first, then points of the search space.

Random points are drawn from (seed, number): the same recipe always tries the same ones, and more trials begin with the
same. With `search.method: tpe` Optuna proposes them, from the results so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.config import ModelConfig, SearchSpace, SweepConfig, TrainConfig
from pipelines.errors import UsageError
from pipelines.stage import digest_of

DEFAULT = "default"
Draw = Callable[[str, tuple[float, float]], float]
Choose = Callable[[str, list[Any]], Any]


@dataclass(frozen=True)
class Point:
    """One trial: its name and the train section that it runs."""

    name: str
    config: TrainConfig

    @property
    def key(self) -> str:
        """What its files are named: another point under the same name has others."""
        return f"{self.name}-{digest_of(self.config.model_dump(mode='json', exclude={'runtime'}))[:8]}"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Point:
        return cls(values["name"], TrainConfig.model_validate(values["config"]))


def points(config: SweepConfig, base: TrainConfig) -> list[Point]:
    """The trials of a random search."""
    return [default_point(config, base)] + [random_point(config, base, n) for n in range(1, config.trials)]


def default_point(config: SweepConfig, base: TrainConfig) -> Point:
    """The recipe's own settings, for as long as every trial has."""
    return Point(DEFAULT, _judged(base, config))


def random_point(config: SweepConfig, base: TrainConfig, number: int) -> Point:
    rng = np.random.Generator(np.random.Philox(key=[config.seed, number]))
    return _point(
        config,
        base,
        number,
        draw=lambda _, limits: math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1]))),
        is_off=lambda _: bool(rng.random() < config.search.off),
        choose=lambda _, options: options[int(rng.integers(len(options)))],
    )


@dataclass(frozen=True)
class TpeSpace:
    """The search space as Optuna's define-by-run function; it lies in a file between runs, so it is plain data."""

    config: SweepConfig
    base: TrainConfig

    def __call__(self, trial: Any) -> dict[str, Any]:
        """`trial` is an optuna.Trial; the first is the recipe's own point, which need not lie in the space."""
        if trial.number == 0:
            return {"point": default_point(self.config, self.base).to_dict()}
        point = _point(
            self.config,
            self.base,
            trial.number,
            draw=lambda name, limits: trial.suggest_float(name, *limits, log=True),
            is_off=lambda name: bool(self.config.search.off) and trial.suggest_categorical(name, [False, True]),
            choose=lambda name, options: options[trial.suggest_categorical(name, list(range(len(options))))],
        )
        return {"point": point.to_dict()}


def _point(
    config: SweepConfig, base: TrainConfig, number: int, *, draw: Draw, is_off: Callable[[str], bool], choose: Choose
) -> Point:
    space = config.search
    loss = {}
    for term in sorted(space.loss):
        drawn, off = draw(f"loss.{term}", space.loss[term]), is_off(f"loss.{term}.off")
        loss[term] = 0.0 if off else _four_digits(drawn)
    model: ModelConfig = choose("backbone", space.backbones)
    lr = _four_digits(draw("lr", space.lr))
    if space.separation:
        model = model.model_copy(update={"separation": choose("separation", space.separation)})
    if space.cross_attention:
        model = model.model_copy(update={"cross_attention": choose("cross_attention", space.cross_attention)})
    update = {"loss": base.loss.model_copy(update=loss), "model": model, "lr": lr}
    return Point(f"trial-{number:03d}", _judged(base.model_copy(update=update), config))


def _judged(train: TrainConfig, config: SweepConfig) -> TrainConfig:
    """As every trial runs: so many steps, judged on the held-out piece; whoever fails is tried again by the sweep."""
    runtime = train.runtime.model_copy(
        update={"workers": config.runtime.workers_per_trial, "max_failures": 0, "checkpoint_every": None}
    )
    return train.model_copy(
        update={
            "steps": config.steps,
            "validate_every": config.validate_every,
            "holdout": config.holdout,
            "warmup_steps": min(train.warmup_steps, config.steps // 4),
            "runtime": runtime,
        }
    )


def _four_digits(value: float) -> float:
    """So that tables and recipes can hold it."""
    return float(f"{value:.4g}")


def models_of(space: SearchSpace) -> list[ModelConfig]:
    """Every model that a trial may have."""
    return [
        model.model_copy(update={"separation": separation, "cross_attention": layers})
        for model in space.backbones
        for separation in (space.separation or [model.separation])
        for layers in (space.cross_attention or [model.cross_attention])
    ]


def searched(config: TrainConfig, space: SearchSpace) -> dict[str, float | str]:
    """The values of what is searched, by the names that tables and plots show."""
    found: dict[str, float | str] = {"backbone": backbone_name(config.model), "lr": config.lr}
    if space.separation:
        found["separation"] = config.model.separation
    if space.cross_attention:
        found["cross-attention layers"] = str(config.model.cross_attention)
    return found | {f"w.{term}": getattr(config.loss, term) for term in sorted(space.loss)}


def backbone_name(model: ModelConfig) -> str:
    """The timm name, with what else makes it another backbone."""
    more = ", ".join(f"{name}={value}" for name, value in model.backbone_args.items())
    return f"{model.backbone} ({more})" if more else model.backbone


def check_space(space: SearchSpace, known: list[str]) -> None:
    """Raises UsageError for a loss term that there is not."""
    if unknown := sorted(set(space.loss) - set(known)):
        raise UsageError(f"sweep.search.loss: there is no loss term {', '.join(unknown)}; known: {', '.join(known)}")
