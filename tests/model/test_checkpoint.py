"""What is saved is what is loaded, to the bit."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from repsep_model import SegmentorConfig, load_segmentor, save_segmentor
from repsep_model.checkpoint import CheckpointError, load_classes
from tests.model.tiny import PVT, VIT, K, random_images, tiny_segmentor

CLASSES: dict[str, Any] = {
    "classes": [{"id": k, "name": f"Straße {k}", "color": [k, 2 * k, 3 * k]} for k in range(K)],
    "ignore_index": 255,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("segmentor")
    save_segmentor(tiny_segmentor(), directory, classes=CLASSES)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A directory of its own to damage."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (VIT, {}),
        (PVT, {}),
        (VIT, {"separation": "local", "stride": 16, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 0.9)}),
        (PVT, {"separation": "none", "cross_attention": 0, "local_pathway": False}),
    ],
    ids=["vit", "pyramid", "vit local", "pyramid baseline"],
)
@torch.no_grad()
def test_round_trip_gives_the_same_logits_to_the_bit(
    config: SegmentorConfig, changes: Mapping[str, Any], tmp_path: Path
) -> None:
    model = tiny_segmentor(config, **changes)
    save_segmentor(model, tmp_path / "new" / "folder", classes=CLASSES)
    loaded = load_segmentor(tmp_path / "new" / "folder")
    images = random_images(2, 49, 63)
    torch.testing.assert_close(loaded(images).logits, model.eval()(images).logits, rtol=0, atol=0)


def test_loaded_segmentor_is_ready_for_inference(saved: Path) -> None:
    model = load_segmentor(saved)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.identity_head is None


def test_config_comes_back_with_all_that_was_resolved(saved: Path) -> None:
    assert load_segmentor(saved).config == tiny_segmentor().config
    settings = json.loads((saved / "segmentor.json").read_text())["config"]
    assert settings["mean"] == [0.5, 0.5, 0.5]
    assert settings["window"] == 512


def test_saving_leaves_a_model_in_training_as_it_was(tmp_path: Path) -> None:
    model = tiny_segmentor().train()
    names = list(model.state_dict())
    save_segmentor(model, tmp_path, classes=CLASSES)
    assert model.training
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


def test_directory_holds_the_three_files_and_no_training_only_weights(saved: Path) -> None:
    assert {f.name for f in saved.iterdir()} == {"model.safetensors", "segmentor.json", "classes.json"}
    stored = set(load_file(saved / "model.safetensors"))
    assert stored == set(tiny_segmentor().for_inference().state_dict())
    assert not any(name.startswith(("local_head", "identity_head", "embedding_head")) for name in stored)


def test_class_list_is_kept_unchanged(saved: Path) -> None:
    assert load_classes(saved) == CLASSES
    assert '"Straße 3"' in (saved / "classes.json").read_text(encoding="utf-8"), "readable by people too"


def test_class_list_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 classes given for a model of 5"):
        save_segmentor(tiny_segmentor(), tmp_path, classes={"classes": CLASSES["classes"][:2]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "segmentor.json", "classes.json"])
def test_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"holds no segmentor: {name} is missing"):
        load_segmentor(copied)


def with_settings(**changes: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        settings = json.loads((directory / "segmentor.json").read_text())
        settings["config"].update(changes)
        (directory / "segmentor.json").write_text(json.dumps(settings))

    return damage


def without_classes(directory: Path) -> None:
    settings = json.loads((directory / "segmentor.json").read_text())
    del settings["config"]["num_classes"]
    (directory / "segmentor.json").write_text(json.dumps(settings))


def truncate_weights(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_weights, "cannot be loaded"),
        (lambda d: (d / "segmentor.json").write_text("{"), "cannot be loaded"),
        (lambda d: (d / "segmentor.json").write_text('{"format": 2}'), "has format 2, this version reads 1"),
        (lambda d: (d / "segmentor.json").write_text('{"format": 1}'), "cannot be loaded: 'config'"),
        (without_classes, "cannot be loaded: .*num_classes"),
        (with_settings(num_classes=7), r"cannot be loaded: [\s\S]*size mismatch"),
        (with_settings(separation="none"), r"cannot be loaded: [\s\S]*Unexpected key"),
        (with_settings(from_the_future=1), "cannot be loaded: unknown segmentor setting from_the_future"),
        (with_settings(backbone="vit_of_tomorrow"), "cannot be loaded: timm does not know"),
    ],
)
def test_damaged_or_foreign_directory_is_a_checkpoint_error(
    copied: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(copied)
    with pytest.raises(CheckpointError, match=message):
        load_segmentor(copied)
