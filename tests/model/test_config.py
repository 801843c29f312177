"""The segmentor's config: what it accepts, how it says no, and that a file holds all of it."""

import json
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest

from repsep_model import SegmentorConfig

FULL = SegmentorConfig(
    backbone="vit_tiny_patch16_224",
    num_classes=7,
    backbone_args={"depth": 4},
    width=32,
    stride=16,
    drop_path=0.2,
    local_pathway=False,
    local_discrepancy=False,
    uniform_smoothing=True,
    attention_supervision=False,
    separation="local",
    cross_attention=2,
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    window=256,
)


def test_config_survives_json() -> None:
    assert SegmentorConfig.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL


def test_full_config_differs_from_the_defaults_everywhere() -> None:
    """Keeps the round trip above honest when a field is added."""
    defaults = asdict(SegmentorConfig(backbone="pvt_v2_b0", num_classes=5))
    assert [name for name, value in asdict(FULL).items() if value == defaults[name]] == []


def test_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown segmentor setting widht; known: .*width"):
        SegmentorConfig.from_dict(FULL.to_dict() | {"widht": 8})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes must be 1 to 255, got 0"),
        ({"num_classes": 256}, "num_classes must be 1 to 255, got 256"),
        ({"num_classes": 5.0}, "num_classes must be an int, got 5.0"),
        ({"num_classes": "5"}, "num_classes must be an int, got '5'"),
        ({"drop_path": 1.0}, "drop_path must be 0 or more and under 1, got 1.0"),
        ({"drop_path": -0.1}, "drop_path must be 0 or more and under 1, got -0.1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"stride": 12}, "stride must be 4, 8, 16 or 32, got 12"),
        ({"separation": "global"}, "separation must be one of .*'region'.*, got 'global'"),
        ({"cross_attention": -1}, "cross_attention counts layers: 0 or more, got -1"),
        ({"width": 4}, "width must be at least 8, got 4"),
        ({"mean": (0.5, 0.5)}, "mean needs 3 values, one per channel"),
        ({"std": (0.5,)}, "std needs 3 values, one per channel"),
    ],
)
def test_wrong_value_is_refused_with_the_name_of_its_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentorConfig.from_dict({"backbone": "pvt_v2_b0", "num_classes": 5} | change)


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("num_classes", "the adapter"),
        ("in_chans", "the adapter"),
        ("features_only", "the adapter"),
        ("drop_path_rate", "drop_path"),
        ("pretrained", "build_segmentor"),
    ],
)
def test_backbone_argument_that_is_set_elsewhere_is_refused_by_name(name: str, by: str) -> None:
    with pytest.raises(ValueError, match=f"backbone_args may not hold {name}: it is set by {by}"):
        SegmentorConfig(backbone="pvt_v2_b0", num_classes=5, backbone_args={"depth": 4, name: 1})


def test_255_classes_are_the_most() -> None:
    assert SegmentorConfig(backbone="pvt_v2_b0", num_classes=255).num_classes == 255


def test_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        FULL.width = 8  # type: ignore[misc]


def test_fields_are_given_by_name_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        SegmentorConfig("pvt_v2_b0", 5)  # type: ignore[call-arg]
