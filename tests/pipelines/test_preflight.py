"""What would end a workflow late is refused before it trains, and says what to do; what is right is let through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.cli import repsep
from pipelines import tracking
from pipelines.bulk.commits import CLASSES as CLASSES_FILE
from pipelines.bulk.commits import Output
from pipelines.config import Recipe
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.models import FILES, digest_of_files
from pipelines.preflight import check_champion, check_dataset, check_recipe
from pipelines.prepare import prepare
from pipelines.segment import MASK_SETTINGS
from pipelines.storage import Folder
from pipelines.workflow import plan_workflow
from repsep_model.checkpoint import save_segmentor
from tests.model.tiny import VIT, tiny_segmentor
from tests.pipelines.layout import CLASSES, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), ["train/0", "train/1", "val/0"])


@pytest.fixture(scope="module")
def values(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("whole")
    return {
        "workspace": str(root / "work"),
        "tracking": {"uri": f"sqlite:///{root}/mlflow.db"},
        "prepare": {"source": str(source)},
        "register": {"name": "streets"},
    }


@pytest.fixture(scope="module")
def dataset(values: dict[str, Any]) -> Dataset:
    recipe = Recipe.model_validate(values)
    return open_dataset(prepare(values["workspace"], recipe.prepare).results["dataset"])


@pytest.fixture
def ends(source: Path, tmp_path: Path) -> dict[str, str]:
    return {"source": str(source / "images"), "target": str(tmp_path / "out")}


# ---------------------------------------------------------------- the recipe


def test_a_recipe_of_which_all_is_there_passes(values: dict[str, Any], dataset: Dataset, ends: dict[str, str]) -> None:
    gate = {"name": "streets", "class_floors": {"road": 0.5}, "min_retention": 0.5}
    whole = values | {"segment": ends, "register": gate, "evaluate": {"corruptions": "fast"}}
    recipe = Recipe.model_validate(whole)
    check_recipe(recipe)
    check_dataset(recipe, dataset)
    assert not Path(ends["target"]).exists(), "it only looks"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"register": {"min_retention": 0.5}}, "evaluate.corruptions=fast or full"),
        ({"segment": {"source": "IMAGES"}}, "segment.source and segment.target"),
        ({"segment": {"target": "OUT"}}, "segment.source and segment.target"),
        ({"segment": {"source": "IMAGES", "target": "IMAGES"}}, "masks need a prefix of their own"),
        ({"segment": {"source": "NOWHERE", "target": "OUT"}}, "there is nothing there"),
        ({"segment": {"source": "OTHERS", "target": "OUT"}}, r"holds no image and no shard \(2 other objects there"),
        ({"segment": {"source": "IMAGES", "target": "FOREIGN"}}, "it is not an output of repsep; use an empty prefix"),
        ({"segment": {"source": "IMAGES", "target": "TAKEN"}}, r"was written with bf16 False instead of True; use"),
    ],
)
def test_what_is_wrong_with_gate_and_bulk_run_is_said_before_anything_runs(
    sections: dict[str, Any], said: str, values: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    (tmp_path / "others").mkdir()
    for name in ("a.txt", "b.csv"):
        (tmp_path / "others" / name).write_text("no image")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / CLASSES_FILE).write_text("{}")
    Output(Folder(str(tmp_path / "taken"))).claim(identity(source / "images", bf16=False), {}, overwrite=False)
    places = {name: str(tmp_path / name.lower()) for name in ("OUT", "NOWHERE", "OTHERS", "FOREIGN", "TAKEN")}
    text = json.dumps(sections)
    for name, place in (places | {"IMAGES": str(source / "images")}).items():
        text = text.replace(f'"{name}"', json.dumps(place))
    recipe = Recipe.model_validate(values | json.loads(text) | {"workspace": str(tmp_path / "work")})
    with pytest.raises(RepsepError, match=said):
        next(plan_workflow(recipe))
    assert not (tmp_path / "work").exists()


def identity(source: Path, **changes: Any) -> dict[str, Any]:
    """What the run.json of an output says."""
    settings = Recipe.model_validate({"segment": {}}).segment
    assert settings is not None
    fixed = {"format": 1, "model": "the champion before", "source": str(source)}
    return fixed | {name: getattr(settings, name) for name in MASK_SETTINGS} | changes


def test_a_target_of_another_model_is_no_error_before_there_is_a_new_one(
    values: dict[str, Any],
    dataset: Dataset,
    ends: dict[str, str],
    registry: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Output(Folder(ends["target"])).claim(identity(Path(ends["source"])), {}, overwrite=False)
    recipe = Recipe.model_validate(values | {"segment": ends})
    check_recipe(recipe)
    check_champion(recipe, dataset)
    assert f"{ends['target']} holds the masks of a model; if another becomes champion" in capsys.readouterr().err
    check_champion(Recipe.model_validate(values | {"segment": ends | {"overwrite": True}}), dataset)
    assert capsys.readouterr().err == ""


def test_only_the_beginning_of_the_bulk_source_is_listed(
    values: dict[str, Any], ends: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.bulk import listing, plan

    def pages(folder: Folder) -> Any:
        yield next(listing.pages(folder))
        pytest.fail("it went on although an image was found")

    monkeypatch.setattr(plan, "pages", pages)
    check_recipe(Recipe.model_validate(values | {"segment": ends}))


# ---------------------------------------------------------------- the data


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("register.class_floors={lane: 0.5}", "there is no class 'lane'; there are sky, road, tree"),
        ("evaluate.split=test", "has no split 'test'; it has train, val"),
    ],
)
def test_a_class_or_split_that_the_data_have_not_ends_plan_and_workflow_after_prepare(
    key: str, said: str, values: dict[str, Any], dataset: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    for plan in ([], ["--plan"]):
        found = CliRunner().invoke(repsep, ["workflow", "--config", str(tmp_path / "recipe.yaml"), "--set", key, *plan])
        assert isinstance(found.exception, UsageError)
        assert said in str(found.exception)
        assert found.stdout.startswith("prepare   cached")
    assert [path.name for path in Path(values["workspace"]).iterdir()] == ["prepare"]


# ---------------------------------------------------------------- the champion


@pytest.fixture(scope="module")
def database(values: dict[str, Any]) -> str:
    uri: str = values["tracking"]["uri"]
    tracking.client_for(uri).create_registered_model("streets")
    return uri


@pytest.fixture
def registry(database: str, tmp_path: Path) -> Callable[..., Path]:
    """Makes a segmentor champion; returns where the registry keeps its files."""

    def champion(names: tuple[str, ...] = ("sky", "road", "tree"), backbone: str | None = None) -> Path:
        classes = [c | {"name": name} for c, name in zip(CLASSES, names, strict=True)]
        folder = tmp_path / "segmentor"
        save_segmentor(
            tiny_segmentor(VIT, num_classes=len(names)),
            folder,
            classes={"name": "drawn", "ignore_index": 255, "classes": classes},
        )
        if backbone is not None:
            file = folder / "segmentor.json"
            file.write_text(file.read_text().replace(VIT.backbone, backbone))
        client = tracking.client_for(database)
        config = Recipe.model_validate({"tracking": {"uri": database}}).tracking
        run = tracking.start_run(config, "register")
        client.log_artifacts(run, str(folder), "model/artifacts/segmentor")
        digest = digest_of_files({name: (folder / name).read_bytes() for name in FILES})
        source = f"{client.get_run(run).info.artifact_uri}/model"
        made = client.create_model_version("streets", source, run, tags={tracking.DIGEST_TAG: digest})
        client.set_registered_model_alias("streets", "champion", made.version)
        return Path(source.removeprefix("file://")) / "artifacts/segmentor"

    return champion


def test_a_champion_of_these_classes_that_loads_passes(
    values: dict[str, Any], dataset: Dataset, registry: Callable[..., Path]
) -> None:
    registry()
    check_champion(Recipe.model_validate(values), dataset)


def test_a_registry_without_a_champion_passes(values: dict[str, Any], dataset: Dataset, database: str) -> None:
    check_champion(Recipe.model_validate(values | {"register": {"name": "another"}}), dataset)


def test_a_champion_of_other_classes_is_refused(
    values: dict[str, Any], dataset: Dataset, registry: Callable[..., Path]
) -> None:
    registry(("sky", "lane", "tree"))
    with pytest.raises(UsageError, match=r"has other classes \(sky, lane, tree\) than the dataset \(sky, road, tree\)"):
        check_champion(Recipe.model_validate(values), dataset)


def test_a_champion_whose_files_were_changed_ends_the_workflow_before_training(
    values: dict[str, Any], dataset: Dataset, registry: Callable[..., Path]
) -> None:
    file = registry() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    lines = plan_workflow(Recipe.model_validate(values))
    assert next(lines)[0] == "prepare"
    with pytest.raises(RepsepError, match=r"are not those that were registered.*repsep models rollback"):
        next(lines)


def test_a_champion_that_this_code_cannot_load_is_refused(
    values: dict[str, Any], dataset: Dataset, registry: Callable[..., Path]
) -> None:
    registry(backbone="vit_of_another_timm")
    with pytest.raises(
        RepsepError, match=r"the champion models:/streets/\d+: .*cannot be loaded.*make another version champion"
    ):
        check_champion(Recipe.model_validate(values), dataset)


def test_mlflow_that_is_away_is_said_before_training(
    values: dict[str, Any], dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    recipe = Recipe.model_validate(values | {"tracking": {"uri": "http://127.0.0.1:9"}})
    with pytest.raises(RepsepError, match=r"MLflow at http://127.0.0.1:9 cannot be used"):
        check_champion(recipe, dataset)
