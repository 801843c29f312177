"""What is saved is what is loaded, to the bit; and weights of others are taken in without running their code."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from repsep_model import SegmentorConfig, build_segmentor, load_segmentor, save_segmentor
from repsep_model.backbone import Backbone
from repsep_model.checkpoint import CheckpointError, load_classes
from repsep_model.pretrained import load_pretrained
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


def timm_weights(config: SegmentorConfig = VIT, **changes: Any) -> dict[str, Tensor]:
    """The state dict of a whole timm classifier, as it is published."""
    torch.manual_seed(1)
    model = timm.create_model(config.backbone, num_classes=10, **(dict(config.backbone_args) | changes))
    return dict(model.state_dict())


def tiny_backbone(config: SegmentorConfig = VIT) -> Backbone:
    return Backbone(config.backbone, args=config.backbone_args)


def write(state: Any, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("config", [VIT, PVT], ids=["vit", "pyramid"])
def test_timm_weights_find_their_place_whole(config: SegmentorConfig, name: str, tmp_path: Path) -> None:
    state = timm_weights(config)
    backbone = tiny_backbone(config)
    report = load_pretrained(backbone, write(state, tmp_path / name))
    own = backbone.model.state_dict()
    assert set(report.matched) == set(own)
    assert report.missing == report.resized == ()
    assert {n.split(".")[0] for n in report.unexpected} <= {"head", "norm"}
    assert "head.weight" in report.unexpected
    for key, tensor in own.items():
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=0)
    assert str(report).startswith(f"{len(own)} matched, 0 resized, 0 missing [], ")


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_inside_a_training_checkpoint_are_found(key: str, tmp_path: Path) -> None:
    file = write({key: timm_weights(), "epoch": 3}, tmp_path / "checkpoint.pth")
    assert load_pretrained(tiny_backbone(), file).missing == ()


def test_position_embeddings_of_another_image_size_are_resized_and_reported(tmp_path: Path) -> None:
    file = write(timm_weights(img_size=64), tmp_path / "weights.safetensors")
    report = load_pretrained(tiny_backbone(), file)
    assert report.resized == ("pos_embed",)
    assert report.missing == ()


def test_blocks_that_a_file_lacks_are_reported(tmp_path: Path) -> None:
    file = write(timm_weights(depth=3), tmp_path / "weights.safetensors")
    report = load_pretrained(tiny_backbone(), file)
    assert {name.rsplit(".", 2)[0].split(".")[0:2] == ["blocks", "3"] for name in report.missing} == {True}
    assert "missing ['blocks.3." in str(report)


def test_weights_of_another_width_do_not_fit_and_say_so(tmp_path: Path) -> None:
    file = write({"encoder.weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has no weights for this backbone; its first keys: \['encoder.weight'\]"
    ):
        load_pretrained(tiny_backbone(), file)


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    state: dict[str, Any] = timm_weights() | {"extra": Payload(tmp_path / "made")}
    file = write(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_pretrained(tiny_backbone(), file)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [[torch.zeros(3)], torch.zeros(3)], ids=["a list", "a tensor"])
def test_file_without_names_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds a {type(content).__name__}, not a state dict"):
        load_pretrained(tiny_backbone(), write(content, tmp_path / "weights.pth"))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_file_that_is_absent_or_broken_is_a_checkpoint_error(name: str, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{name} cannot be read as weights"):
            load_pretrained(tiny_backbone(), tmp_path / name)
        (tmp_path / name).write_bytes(b"not weights")


@pytest.mark.parametrize("kind", [str, Path])
def test_build_segmentor_takes_a_file_of_backbone_weights(kind: type[str] | type[Path], tmp_path: Path) -> None:
    state = timm_weights()
    model = build_segmentor(VIT, pretrained=kind(write(state, tmp_path / "weights.safetensors")))
    torch.testing.assert_close(model.backbone.model.blocks[2].attn.qkv.weight, state["blocks.2.attn.qkv.weight"])
