"""A recipe: what is wrong with it is said with the key's full name, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.config import RECIPES, Recipe, load_recipe
from pipelines.errors import StorageError, UsageError
from pipelines.storage import Folder


@pytest.fixture
def recipe_file(tmp_path: Path) -> Any:
    def write(text: str | bytes, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("trian: {}", "trian", "train"),
        ("train: {stepz: 5}", "train.stepz", "steps"),
        ("train: {model: {backbon: x}}", "train.model.backbon", "backbone"),
        ("train: {runtime: {worker: 1}}", "train.runtime.worker", "workers"),
        ("register: {nmae: x}", "register.nmae", "name"),
        ("register_: {name: x}", "register_", "register"),
        ("sweep: {trails: 3}", "sweep.trails", "trials"),
        ("sweep: {search: {backbones: [{widht: 8}]}}", "sweep.search.backbones.0.widht", "width"),
        ("segment: {runtime: {modelactors: 2}}", "segment.runtime.modelactors", "model_actors"),
    ],
)
def test_an_unknown_key_is_named_in_full_with_the_nearest_one(recipe_file: Any, text: str, key: str, near: str) -> None:
    file = recipe_file(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    assert str(caught.value) == f"{file}: {key}: there is no such key; did you mean {near}?"


def test_an_unknown_key_that_is_like_no_other_is_answered_with_all_of_them(recipe_file: Any) -> None:
    with pytest.raises(UsageError, match=r"prepare\.zzz: there is no such key; known: source, val_fraction, .*, seed$"):
        load_recipe(recipe_file("prepare: {zzz: 1}"))


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train: {steps: many}", "train.steps", "'many'"),
        ("train: {steps: 0}", "train.steps", "0"),
        ("train: {lr: .nan}", "train.lr", "nan"),
        ("train: {model: {stride: 5}}", "train.model.stride", "5"),
        ("train: {augment: {scale: [0.5]}}", "train.augment.scale.1", "[0.5]"),
        ("train: {model: {pretrained: [1]}}", "train.model.pretrained", "[1]"),
        ("train: 5", "train", "5"),
        ("train:", "train", "None"),
        ("sweep: {search: {loss: {local: [1, high]}}}", "sweep.search.loss.local.1", "'high'"),
        ("register: {name: team/model}", "register.name", "'team/model'"),
        ('register: {name: "bob\'s"}', "register.name", '"bob\'s"'),
        ("tracking: {experiment: ''}", "tracking.experiment", "''"),
        ("evaluate: {scales: []}", "evaluate.scales", "[]"),
        ("evaluate: {scales: [1, 0]}", "evaluate.scales.1", "0"),
        ("evaluate: {pixel_budget: 0}", "evaluate.pixel_budget", "0"),
    ],
)
def test_a_wrong_value_is_shown_with_its_key(recipe_file: Any, text: str, key: str, value: str) -> None:
    file = recipe_file(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{file}: {key}")
    assert first.endswith(f"(got {value})")


def test_values_that_do_not_go_together_are_named_without_the_rest(recipe_file: Any) -> None:
    file = recipe_file("sweep: {steps: 10, validate_every: 20}")
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    assert str(caught.value) == f"{file}: sweep: validate_every=20 is over steps=10: no trial would report"


@pytest.mark.parametrize("scale", ["[0, 1]", "[-1, 2]", "[2, 0.5]"])
def test_a_scale_that_is_no_range_of_factors_is_named(recipe_file: Any, scale: str) -> None:
    with pytest.raises(UsageError, match=r"train\.augment: scale is a range of factors over 0, low then high"):
        load_recipe(recipe_file(f"train: {{augment: {{scale: {scale}}}}}"))


def test_all_that_is_wrong_is_said_at_once(recipe_file: Any) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file("train: {stepz: 5, lr: -1}\nevaluate: {overlays: -3}"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(any(key in line for line in lines) for key in ("train.stepz", "train.lr", "evaluate.overlays"))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.steps=7", 7),
        (" train.steps = 7", 7),
        ("train.lr=1e-3", 1e-3),
        ("train.lr=0.01", 0.01),
        ("train.bf16=false", False),
        ("train.augment.scale=[0.8, 1.2]", (0.8, 1.2)),
        ("train.model.backbone_args={depth: 2}", {"depth": 2}),
        ("train.model.backbone=a=b", "a=b"),
        ("train.dataset=s3://bucket/folder", "s3://bucket/folder"),
        ("evaluate.scales=[0.5, 1]", (0.5, 1.0)),
        ("train.micro_batch=null", None),
        ("train.micro_batch=", None),
    ],
)
def test_a_setting_replaces_one_key(setting: str, expected: object) -> None:
    recipe: Any = load_recipe(None, [setting])
    for part in setting.partition("=")[0].strip().split("."):
        recipe = getattr(recipe, part)
    assert recipe == expected


def test_a_setting_leaves_the_other_keys_of_the_file(recipe_file: Any) -> None:
    file = recipe_file("train: {steps: 5, lr: 0.1}\nregister: {name: streets}")
    recipe = load_recipe(file, ["train.steps=6", "train.model.width=16", "register.name=roads", "train.steps=7"])
    assert (recipe.train.steps, recipe.train.lr, recipe.train.model.width) == (7, 0.1, 16)
    assert recipe.register_.name == "roads"


@pytest.mark.parametrize("setting", ["train.steps", "=5", " = 5", "train.augment.scale=[1", "train.steps=a: b: c"])
def test_a_setting_that_cannot_be_read_is_shown(setting: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(None, [setting])
    assert f"--set {setting}" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.stepz=5", "train.stepz: there is no such key; did you mean steps?"),
        ("train..steps=5", "train.: there is no such key"),
        ("train.steps.more=5", "train.steps: "),
        ("segment.limit=0", "segment.limit: "),
    ],
)
def test_a_setting_is_checked_as_the_file_is(setting: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(None, [setting])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("train: [1", "is not valid YAML"),
        ("- train\n- sweep\n", "must hold sections such as `train:`, it holds a list"),
        ("just words", "it holds a str"),
        (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "is not valid YAML"),
        ("train: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(recipe_file: Any, content: str | bytes, said: str) -> None:
    file = recipe_file(content)
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(str(file))
    assert said in str(caught.value)


def test_an_empty_file_means_the_defaults(recipe_file: Any) -> None:
    assert load_recipe(recipe_file("# nothing\n")) == Recipe() == load_recipe(None)


@pytest.mark.parametrize("name", ["missing.yaml", "folder/missing.yaml", "missing"])
def test_a_missing_recipe_is_answered_with_those_that_come_along(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no recipe .*missing\.yaml; .*demo, .*sweep"):
        load_recipe(name if name == "missing" else tmp_path / name)


def test_a_recipe_may_lie_in_object_storage(s3: str) -> None:
    folder = Folder(f"s3://{s3}/recipes")
    folder.write("streets.yaml", b"train: {steps: 3}")
    folder.write("broken.yaml", b"train: [1")
    assert load_recipe(f"s3://{s3}/recipes/streets.yaml").train.steps == 3
    with pytest.raises(UsageError, match=f"s3://{s3}/recipes/broken.yaml is not valid YAML"):
        load_recipe(f"s3://{s3}/recipes/broken.yaml")
    with pytest.raises(StorageError, match=f"s3://{s3}/recipes/missing.yaml: there is nothing there"):
        load_recipe(f"s3://{s3}/recipes/missing.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_that_comes_along_loads_by_path_and_by_name(path: Path) -> None:
    assert load_recipe(path) == load_recipe(path.stem) != Recipe()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_that_comes_along_says_how_it_is_run_and_what_it_gives(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert "repsep" in head[0]
    assert any("hardware:" in line for line in head)
    assert any("result:" in line for line in head)


def test_a_file_of_that_name_goes_before_the_recipe_that_comes_along(
    recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_file("train: {steps: 3}", "demo")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo").train.steps == 3


def test_every_field_says_what_it_is_for() -> None:
    silent = []
    waiting: list[Any] = [Recipe]
    while waiting:
        model = waiting.pop()
        for name, field in model.model_fields.items():
            members = [field.annotation, *getattr(field.annotation, "__args__", ())]
            sections = [m for m in members if hasattr(m, "model_fields")]
            waiting += sections
            if not sections and not field.description:
                silent.append(f"{model.__name__}.{name}")
    assert not silent
