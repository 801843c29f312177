"""The adapter over timm: maps, strides and taps of several families.

Shapes: B batch, C channels, H x W pixels, h x w grid.
"""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from repsep_model import backbone as backbone_module
from repsep_model.backbone import Backbone, _plain_taps
from tests.model.tiny import FAMILIES

SMALL = {"depth": 4, "embed_dim": 48, "num_heads": 3}


@pytest.mark.parametrize(("name", "args"), FAMILIES.values(), ids=FAMILIES)
def test_four_maps_have_the_announced_channels_and_strides_on_a_non_square_image(
    name: str, args: dict[str, Any]
) -> None:
    backbone = Backbone(name, args=args).eval()
    height, width = 2 * backbone.multiple, 3 * backbone.multiple
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, height, width))
    expected = [(2, c, height // r, width // r) for c, r in zip(backbone.channels, backbone.strides, strict=True)]
    assert [tuple(m.shape) for m in maps] == expected
    assert len(maps) == 4


@pytest.mark.parametrize(("name", "args"), FAMILIES.values(), ids=FAMILIES)
def test_every_parameter_left_in_a_backbone_gets_a_gradient(name: str, args: dict[str, Any]) -> None:
    """An unused parameter stops data-parallel training at its second step."""
    backbone = Backbone(name, args=args).train()
    maps = backbone(torch.randn(1, 3, 2 * backbone.multiple, 2 * backbone.multiple))
    torch.stack([m.square().sum() for m in maps]).sum().backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


def test_plain_taps_follow_each_quarter_of_the_blocks() -> None:
    assert _plain_taps(12, "vit") == [2, 5, 8, 11]
    assert _plain_taps(24, "vit") == [5, 11, 17, 23]
    assert _plain_taps(6, "vit") == [0, 2, 3, 5]


def test_taps_of_a_plain_vit_are_its_blocks_outputs_without_prefix_tokens() -> None:
    args = {"depth": 8, "embed_dim": 48, "num_heads": 3}
    backbone = Backbone("vit_small_patch14_reg4_dinov2", args=args).eval()
    seen: dict[int, Tensor] = {}
    for number, block in enumerate(backbone.model.blocks):
        block.register_forward_hook(lambda _m, _i, out, number=number: seen.update({number: out}))
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 28, 42))
    prefix = 1 + 4
    for tap, found in zip((1, 3, 5, 7), maps, strict=True):
        expected = seen[tap][:, prefix:].transpose(1, 2).reshape(1, 48, 2, 3)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_drop_path_reaches_the_model_and_acts_in_training_only() -> None:
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", drop_path=0.9, args=SMALL)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        last = [backbone.train()(x)[-1] for _ in range(4)]
        still = [backbone.eval()(x)[-1] for _ in range(2)]
    assert any(not torch.equal(last[0], other) for other in last[1:])
    assert torch.equal(*still)


def test_mean_and_std_are_those_the_weights_were_trained_with() -> None:
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert cfg is not None
    assert Backbone("vit_tiny_patch16_224", args=SMALL).mean_std == (tuple(cfg.mean), tuple(cfg.std))


def test_unknown_name_is_refused_with_near_ones() -> None:
    with pytest.raises(ValueError, match=r"timm does not know a backbone called 'pvt_b9'; near: pvt_v2_b5"):
        Backbone("pvt_b9", args={})


def test_backbone_with_too_few_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="has 3 blocks, at least 4 are needed"):
        Backbone("vit_tiny_patch16_224", args=SMALL | {"depth": 3})


def test_wrong_argument_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"cannot be built with .*'depht': 4"):
        Backbone("vit_tiny_patch16_224", args={"depht": 4})


def test_model_without_intermediate_maps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "_create", lambda *_args, **_kwargs: nn.Linear(1, 1))
    with pytest.raises(ValueError, match="gives no intermediate maps"):
        Backbone("vit_tiny_patch16_224", args={})


def test_a_model_for_one_oblong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is built for 64 x 96 pixels only; give a square img_size"):
        Backbone("beit_base_patch16_224", args=SMALL | {"img_size": (64, 96)})


@pytest.mark.parametrize(
    ("name", "args"),
    [("vit_tiny_patch16_224.nonsense", {}), ("vit_tiny_patch16_224", SMALL | {"num_heads": 5})],
)
def test_what_timm_refuses_is_said_with_the_backbones_name(name: str, args: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"backbone '{name}' cannot be built with"):
        Backbone(name, args=args)


def test_a_model_without_stochastic_depth_is_built_all_the_same() -> None:
    assert Backbone("efficientvit_b0", drop_path=0.1, args={}).strides == [4, 8, 16, 32]


@torch.no_grad()
def test_a_model_that_reads_its_tables_by_index_is_held_to_its_own_size() -> None:
    """On the meta device MViTv2 seems to take any size; with values it fails over its own."""
    backbone = Backbone("mvitv2_tiny", args={"img_size": (64, 64)}).eval()
    assert (backbone.multiple, backbone.window) == (64, 64)
    assert [tuple(m.shape[-2:]) for m in backbone(torch.randn(1, 3, 64, 128))] == [(16, 32), (8, 16), (4, 8), (2, 4)]
