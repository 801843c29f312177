"""init_from: weights of a segmentor of other classes, its class rows by name.

Shapes: B batch, K classes, H x W pixels.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from repsep_model import CheckpointError, LossWeights, Segmentor, init_from, save_segmentor
from repsep_model.optim import Ema, parameter_groups
from repsep_model.training import StepSettings, TrainState, train_step
from tests.model.tiny import PVT, VIT, K, random_images, random_labels, tiny_segmentor

NAMES = ["road", "tree", "sky", "car", "sign"]
LISTS = {
    "the same": NAMES,
    "reordered": ["sky", "sign", "road", "tree", "car"],
    "extended": ["dog", *NAMES, "cat"],
    "shrunk": ["car", "road"],
    "all at once": ["cat", "sign", "dog", "tree"],
    "nothing shared": ["cat", "dog"],
}
CLASS_WEIGHTS = {
    "classifier.weight": 0,
    "classifier.bias": 0,
    "coarse_head.weight": 0,
    "coarse_head.bias": 0,
    "cross_attention.queries": 0,
}
"""What the tests hold init_from to: it must find these by itself."""


def save(directory: Path, model: Segmentor, names: list[str] = NAMES) -> Path:
    classes = [{"id": k, "name": name, "color": [k, k, k]} for k, name in enumerate(names)]
    save_segmentor(model, directory, classes={"classes": classes, "ignore_index": 255})
    return directory


def filled(source: Path, names: list[str], **changes: Any) -> tuple[Segmentor, dict[str, Tensor], Any]:
    """A model of other random weights after init_from, its weights before, and the report."""
    model = tiny_segmentor(seed=1, num_classes=len(names), **changes).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    return model, before, init_from(model, source, names)


@pytest.mark.parametrize("names", LISTS.values(), ids=LISTS)
def test_every_class_takes_its_own_rows_and_a_new_one_keeps_its_fresh_ones(tmp_path: Path, names: list[str]) -> None:
    given = tiny_segmentor()
    model, before, report = filled(save(tmp_path, given), names)
    there, found = given.state_dict(), model.state_dict()
    training_only = {name for name in found if name.startswith(("local_head", "identity_head", "embedding_head"))}
    for name, weights in found.items():
        if name in training_only:
            expected = before[name]
        elif name in CLASS_WEIGHTS:
            rows = [there[name][NAMES.index(n)] if n in NAMES else before[name][k] for k, n in enumerate(names)]
            expected = torch.stack(rows)
        else:
            expected = there[name]
        torch.testing.assert_close(weights, expected, rtol=0, atol=0, msg=name)
    assert set(report.remapped) == CLASS_WEIGHTS.keys()
    assert set(report.missing) == training_only
    assert set(report.copied) == found.keys() - training_only - CLASS_WEIGHTS.keys()
    assert report.fresh_classes == tuple(n for n in names if n not in NAMES)
    assert report.dropped_classes == tuple(n for n in NAMES if n not in names)


@torch.no_grad()
def test_logits_of_a_reordered_list_are_the_sources_reordered(tmp_path: Path) -> None:
    """Not to the bit: softmaxes over the classes add them in another order."""
    given, names = tiny_segmentor().eval(), LISTS["reordered"]
    model, _, _ = filled(save(tmp_path, given), names)
    images = random_images(2, 49, 63)
    expected = given(images).logits[:, [NAMES.index(name) for name in names]]
    assert not torch.allclose(expected, given(images).logits, atol=1e-2)
    torch.testing.assert_close(model.eval()(images).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [LISTS["extended"], LISTS["shrunk"]], ids=["extended", "shrunk"])
@torch.no_grad()
def test_shared_classes_of_a_plain_head_keep_their_logits(tmp_path: Path, names: list[str]) -> None:
    """A linear head scores each class by itself, so others that come or go change nothing."""
    plain: dict[str, Any] = {"separation": "none", "cross_attention": 0}
    given = tiny_segmentor(**plain).eval()
    model, _, _ = filled(save(tmp_path, given), names, **plain)
    images = random_images(2, 49, 63)
    shared = [name for name in names if name in NAMES]
    found = model.eval()(images).logits[:, [names.index(name) for name in shared]]
    expected = given(images).logits[:, [NAMES.index(name) for name in shared]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_pyramid_backbone_with_local_separation_is_filled_too(tmp_path: Path) -> None:
    parts: dict[str, Any] = {"separation": "local", "cross_attention": 2}
    source = save(tmp_path, tiny_segmentor(PVT, **parts))
    _, _, report = filled(source, LISTS["all at once"], config=PVT, **parts)
    assert set(report.remapped) == {"classifier.weight", "classifier.bias", "cross_attention.queries"}
    assert {name.split(".")[0] for name in report.missing} == {
        "local_head",
        "coarse_head",
        "identity_head",
        "embedding_head",
    }


def test_filled_model_trains(tmp_path: Path) -> None:
    model, _, _ = filled(save(tmp_path, tiny_segmentor(drop_path=0.0)), LISTS["extended"], drop_path=0.0)
    before = model.classifier.weight.detach().clone()
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.0, layer_decay=0.9, head_lr_scale=1.0)
    state = TrainState(model, model, torch.optim.AdamW(groups, lr=1e-3), Ema(model, 0.9))
    settings = StepSettings(LossWeights(), total_steps=5, warmup_steps=0, clip=1.0, bf16=False, seed=0)
    batch = (random_images(2, 48, 48), random_labels(2, 48, 48))
    losses = [train_step(state, [batch], settings)["loss"] for _ in range(5)]
    assert losses[-1] < losses[0]
    assert not torch.equal(model.classifier.weight, before)


def test_report_is_one_line_that_names_the_classes(tmp_path: Path) -> None:
    _, _, report = filled(save(tmp_path, tiny_segmentor()), LISTS["all at once"])
    assert "\n" not in str(report)
    assert "5 remapped by class" in str(report)
    assert "2 classes fresh (cat, dog), 3 dropped (road, sky, car)" in str(report)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 32}, ["width: 16 there, 32 here"]),
        ({"stride": 16, "separation": "local"}, ["stride: 8 there, 16 here", "separation: 'region' there"]),
        ({"config": PVT}, ["backbone: 'vit_tiny_patch16_224' there", "backbone_args:", "mean:", "std:"]),
        ({"mean": (0.1, 0.2, 0.3)}, ["mean:"]),
    ],
    ids=["width", "stride and separation", "backbone", "normalisation"],
)
def test_another_architecture_is_refused_by_the_settings_that_differ(
    tmp_path: Path, changes: dict[str, Any], named: list[str]
) -> None:
    source = save(tmp_path, tiny_segmentor())
    model = tiny_segmentor(**changes)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="another architecture") as caught:
        init_from(model, source, NAMES)
    assert all(name in str(caught.value) for name in named)
    assert str(caught.value).count(" there, ") == len(named)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_settings_that_change_no_weights_may_differ(tmp_path: Path) -> None:
    given = tiny_segmentor(drop_path=0.0)
    model = tiny_segmentor(seed=1, drop_path=0.3, attention_supervision=False, window=640)
    init_from(model, save(tmp_path, given), NAMES)
    torch.testing.assert_close(model.classifier.weight, given.classifier.weight, rtol=0, atol=0)


def test_tuples_of_the_config_are_the_lists_of_the_file(tmp_path: Path) -> None:
    assert any(isinstance(value, tuple) for value in PVT.backbone_args.values())
    source = save(tmp_path, tiny_segmentor(PVT))
    init_from(tiny_segmentor(PVT, seed=1), source, NAMES)


@pytest.mark.parametrize("names", [NAMES[:3], [*NAMES[:4], "road"]], ids=["too few", "one twice"])
def test_class_names_that_do_not_fit_the_model_are_refused(tmp_path: Path, names: list[str]) -> None:
    source = save(tmp_path, tiny_segmentor())
    with pytest.raises(ValueError, match="the model needs 5 class names, no two the same"):
        init_from(tiny_segmentor(), source, names)


def test_source_that_names_two_classes_alike_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path, tiny_segmentor(), ["road", "road", "sky", "car", "sign"])
    with pytest.raises(ValueError, match="no two the same, got \\['road', 'road'"):
        init_from(tiny_segmentor(), source, NAMES)


def test_directory_without_a_segmentor_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        init_from(tiny_segmentor(), tmp_path, NAMES)
    save(tmp_path, tiny_segmentor())
    (tmp_path / "segmentor.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        init_from(tiny_segmentor(), tmp_path, NAMES)


@pytest.mark.parametrize("number", [1, 254, 255])
def test_any_number_of_classes_is_remapped(tmp_path: Path, number: int) -> None:
    names = [f"class {k}" for k in range(number)]
    given = tiny_segmentor(num_classes=number)
    model, _, _ = filled(save(tmp_path, given, names), names[::-1])
    torch.testing.assert_close(model.classifier.weight, given.classifier.weight.flip(0), rtol=0, atol=0)


def test_init_from_leaves_the_configs_alone(tmp_path: Path) -> None:
    source = save(tmp_path, tiny_segmentor(replace(VIT, num_classes=K)))
    model = tiny_segmentor(num_classes=2)
    config, backbone = model.config, model.backbone
    init_from(model, source, ["sky", "dog"])
    assert model.config == config
    assert model.backbone is backbone
