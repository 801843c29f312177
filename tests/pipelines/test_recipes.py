"""Recipes that come along: each says what it costs, loads, and can be built. No weights are fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch

from pipelines.config import RECIPES, load_recipe
from pipelines.label_maps import LabelMap
from pipelines.native_layouts import NATIVE
from pipelines.training.worker import loss_weights, segmentor_config
from repsep_model.inference import window_side
from repsep_model.segmentor import build_segmentor
from repsep_model.transforms import Augmentation

ALL = sorted(RECIPES.glob("*.yaml"))
GENERATED = ("demo", "sweep", "sweep-camvid")


@dataclass(frozen=True)
class Expected:
    """What a reader of the paper expects of a recipe; the backbone's parameters in millions."""

    layout: str
    crop: int
    steps: int
    backbone: float

    @property
    def labels(self) -> LabelMap:
        return NATIVE[self.layout].labels


PUBLIC = {
    "ade20k-vit-l": Expected("ade20k", 640, 80_000, 304),
    "ade20k-beit-l": Expected("ade20k", 640, 80_000, 305),
    "cityscapes-vit-l": Expected("cityscapes", 768, 80_000, 304),
    "cityscapes-swin-b": Expected("cityscapes", 768, 80_000, 87),
    "pascal-context-vit-l": Expected("pascal_context", 480, 20_000, 304),
    "coco-stuff-10k-vit-l": Expected("coco_stuff_10k", 512, 20_000, 304),
    "coco-stuff-164k-vit-l": Expected("coco_stuff_164k", 640, 80_000, 304),
}


def head_of(file: Path) -> list[str]:
    """The comment lines on top."""
    lines = file.read_text().splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.stem)
def test_a_recipe_loads_by_its_name_and_its_head_says_command_hardware_and_result(file: Path) -> None:
    assert load_recipe(file.stem) == load_recipe(file)
    head = head_of(file)
    assert 2 <= len(head) <= 3
    assert head[0].startswith(("# repsep ", "# make "))
    assert all(word in " ".join(head[1:]) for word in ("# hardware: ", "result: "))


def test_every_public_data_set_has_a_recipe_with_a_plain_transformer() -> None:
    assert {file.stem for file in ALL} == {*GENERATED, *PUBLIC}
    assert {e.layout for name, e in PUBLIC.items() if name.endswith("-vit-l")} == set(NATIVE)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_recipe_claims_no_result_and_no_hardware_that_it_was_not_tried_on(name: str) -> None:
    command, hardware, result = head_of(RECIPES / f"{name}.yaml")
    assert command.startswith(f"# repsep workflow --config {name} ")
    assert hardware.endswith(", not tried")
    assert result == "# result: not measured"
    recipe = load_recipe(name)
    assert all(str(uri).startswith("s3://your-bucket/") for uri in (recipe.workspace, recipe.prepare.source))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_recipe_has_the_settings_that_readers_of_the_paper_expect(name: str) -> None:
    recipe, expected = load_recipe(name), PUBLIC[name]
    train = recipe.train
    assert recipe.prepare.layout == expected.layout
    assert train.augment.crop == expected.crop
    whole = recipe.evaluate.pixel_budget
    assert whole == (expected.crop**2 if "swin" in name else None), "what is larger than a crop goes by windows"
    assert (train.steps, train.warmup_steps) == (expected.steps, 1500)
    assert 2e-5 <= train.lr <= 6e-5
    assert (train.weight_decay, train.head_lr_scale) == (0.05, 10)
    assert 0.9 <= train.layer_decay <= 0.95
    assert train.batch_size % train.runtime.workers == 0
    assert train.steps % train.validate_every == 0
    Augmentation(**train.augment.model_dump())
    loss_weights(train.loss)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_recipe_builds_its_model_without_memory(name: str) -> None:
    train, expected = load_recipe(name).train, PUBLIC[name]
    config = train.model
    assert config.pretrained is True
    assert timm.models.is_model_pretrained(config.backbone), "timm has weights of this name"
    with torch.device("meta"):
        model = build_segmentor(segmentor_config(config, len(expected.labels.classes), train.augment.crop))
    assert all(p.is_meta for p in model.parameters())
    backbone, whole = (sum(p.numel() for p in m.parameters()) for m in (model.backbone, model))
    assert backbone / 1e6 == pytest.approx(expected.backbone, abs=1)
    assert 0 < whole - backbone < 25e6
    assert model.classifier.out_channels == len(expected.labels.classes)
    assert expected.crop % model.multiple == 0, "no crop is padded"
    assert window_side(model) == expected.crop
