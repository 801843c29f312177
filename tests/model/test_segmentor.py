"""The segmentor as a whole: shapes at any size, its two modes, its inference copy, its ablations, its size.

Shapes: B batch, K classes, H x W pixels, h x w grid at stride s of the padded image.
"""

import contextlib
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from repsep_model import LossWeights, SegmentorConfig, build_segmentor, segmentation_loss
from repsep_model.losses import total_loss
from repsep_model.segmentor import SegmentorAux, upsample_logits
from tests.model.tiny import PVT, VIT, K, random_images, random_labels, tiny_segmentor

BACKBONES = {"vit": VIT, "pyramid": PVT}
PATCH_14 = replace(VIT, backbone="vit_small_patch14_reg4_dinov2")
BASELINE: dict[str, Any] = {"local_pathway": False, "separation": "none", "cross_attention": 0}
SWITCHES = [
    {},
    BASELINE,
    {"separation": "local"},
    {"separation": "none"},
    {"local_pathway": False},
    {"local_pathway": False, "separation": "local", "cross_attention": 0},
    {"local_discrepancy": False},
    {"uniform_smoothing": True},
    {"uniform_smoothing": True, "separation": "local"},
    {"attention_supervision": False},
    {"cross_attention": 2},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(97, 131), (64, 32), (5, 7)])
@pytest.mark.parametrize("backbone", [*BACKBONES, "patch 14"])
def test_logits_are_fp32_and_have_the_size_of_the_image(backbone: str, size: tuple[int, int], training: bool) -> None:
    model = tiny_segmentor({**BACKBONES, "patch 14": PATCH_14}[backbone]).train(training)
    output = model(random_images(2, *size))
    assert output.logits.shape == (2, K, *size)
    assert output.logits.dtype == torch.float32
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_forward_stride_upsampled_gives_the_logits(backbone: str) -> None:
    model = tiny_segmentor(BACKBONES[backbone]).eval()
    images = random_images(1, 97, 131)
    coarse = model.forward_stride(images)
    padded = [math.ceil(side / model.multiple) * model.multiple for side in (97, 131)]
    assert list(coarse.shape[2:]) == [side // 8 for side in padded]
    full = F.interpolate(coarse, size=padded, mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images).logits, full[..., :97, :131], rtol=0, atol=0)


def test_upsampling_puts_each_grid_value_at_the_centre_of_its_cell() -> None:
    """Resizing to the image's own size instead of the padded one would shift every label."""
    columns = torch.arange(6.0).expand(1, 1, 4, 6)
    out = upsample_logits(columns, 8, (25, 43))
    expected = ((torch.arange(43) + 0.5) / 8 - 0.5).clamp(min=0)
    assert out.shape == (1, 1, 25, 43)
    torch.testing.assert_close(out[0, 0], expected.expand(25, 43))


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_padding_counts_as_the_mean_colour(backbone: str) -> None:
    model = tiny_segmentor(BACKBONES[backbone]).eval()
    images = random_images(1, 40, 50).float()
    height, width = (math.ceil(side / model.multiple) * model.multiple for side in (40, 50))
    by_hand = model.mean.expand(1, 3, height, width).clone()
    by_hand[..., :40, :50] = images
    torch.testing.assert_close(model(images).logits, model(by_hand).logits[..., :40, :50])


@torch.no_grad()
def test_images_are_normalised_by_the_configs_mean_and_std() -> None:
    model = tiny_segmentor(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).eval()
    images = random_images(1, 32, 32)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model(images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    torch.testing.assert_close(seen[0], (images / 255 - mean) / std)


@torch.no_grad()
def test_uint8_and_float_images_give_the_same_logits() -> None:
    model = tiny_segmentor().eval()
    images = random_images(1, 32, 48)
    torch.testing.assert_close(model(images).logits, model(images.float()).logits, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3)])
def test_images_of_another_layout_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\) in 0..255, got shape"):
        tiny_segmentor()(torch.zeros(shape))


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_an_images_logits_do_not_depend_on_the_others_in_its_batch(training: bool) -> None:
    model = tiny_segmentor(drop_path=0.0).train(training)
    images = random_images(3, 48, 64)
    alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(model(images).logits, alone, rtol=1e-4, atol=1e-5)


def test_aux_is_none_in_eval_mode_and_whole_in_training() -> None:
    model = tiny_segmentor()
    images = random_images(2, 40, 72)
    assert model.eval()(images).aux is None
    aux = model.train()(images).aux
    assert aux is not None
    assert (aux.stride, aux.grid) == (8, (6, 10))
    shapes = {
        f.name: tuple(getattr(aux, f.name).shape) for f in fields(SegmentorAux) if f.name not in ("stride", "grid")
    }
    assert shapes == {
        "local_BKhw": (2, K, 6, 10),
        "coarse_BKhw": (2, K, 6, 10),
        "attention_BKhw": (2, K, 6, 10),
        "identity_BK": (2, K),
        "regions_BKD": (2, K, 16),
        "embedding_BEhw": (2, 64, 6, 10),
    }


def test_baseline_has_no_auxiliary_outputs() -> None:
    aux = tiny_segmentor(**BASELINE).train()(random_images(1, 32, 32)).aux
    assert aux is not None
    assert {f.name for f in fields(aux) if getattr(aux, f.name) is None} == {
        "local_BKhw",
        "coarse_BKhw",
        "attention_BKhw",
        "identity_BK",
        "regions_BKD",
        "embedding_BEhw",
    }


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_learns_with_the_default_losses(backbone: str, switches: dict[str, Any]) -> None:
    """Whatever is switched off: a parameter without a gradient stops data-parallel training."""
    model = tiny_segmentor(BACKBONES[backbone], drop_path=0.0, **switches).train()
    weights = LossWeights()
    terms = segmentation_loss(model(random_images(2, 48, 64)), random_labels(2, 48, 64), weights)
    total_loss(terms, weights).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_inference_copy_gives_the_same_logits_to_the_bit(backbone: str, switches: dict[str, Any]) -> None:
    model = tiny_segmentor(BACKBONES[backbone], **switches).eval()
    images = random_images(2, 49, 63)
    torch.testing.assert_close(model.for_inference()(images).logits, model(images).logits, rtol=0, atol=0)


@pytest.mark.parametrize("separation", ["none", "local", "region"])
def test_inference_copy_holds_only_what_the_logits_need(separation: str) -> None:
    copy = tiny_segmentor(separation=separation).for_inference().requires_grad_(True)
    copy(random_images(1, 48, 48)).logits.square().sum().backward()
    assert [n for n, p in copy.named_parameters() if p.grad is None] == []


def test_inference_copy_has_fewer_parameters_and_leaves_the_original_alone() -> None:
    model = tiny_segmentor().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    copy = model.for_inference()
    assert sum(p.numel() for p in copy.parameters()) < sum(p.numel() for p in model.parameters())
    assert not copy.training
    assert not any(p.requires_grad for p in copy.parameters())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_logits_and_aux_are_fp32_under_autocast() -> None:
    model = tiny_segmentor().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(random_images(1, 32, 48))
    assert output.aux is not None
    tensors = [output.logits, *(getattr(output.aux, f.name) for f in fields(output.aux)[2:])]
    assert {t.dtype for t in tensors} == {torch.float32}
    assert all(t.isfinite().all() for t in tensors)


@torch.no_grad()
def test_features_are_the_maps_before_and_after_separation() -> None:
    model = tiny_segmentor(separation="none").eval()
    found = model.features(random_images(1, 48, 64))
    assert [tuple(tap.shape) for tap in found.taps] == [(1, 48, 3, 4)] * 4
    assert found.fused_BDhw.shape == (1, 16, 6, 8)
    assert torch.equal(found.fused_BDhw, found.separated_BDhw)
    moved = tiny_segmentor().eval().features(random_images(1, 48, 64))
    assert not torch.allclose(moved.fused_BDhw, moved.separated_BDhw)


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (replace(VIT, width=None), 96),
        (replace(PVT, width=None), 96),
        (replace(VIT, width=None, backbone_args={"depth": 4, "embed_dim": 768, "num_heads": 3}), 256),
        (replace(VIT, width=24), 24),
    ],
    ids=["tiny vit", "pyramid", "vit of 768 channels", "given"],
)
def test_width_follows_from_the_backbone_unless_it_is_given(config: SegmentorConfig, width: int) -> None:
    with torch.device("meta"):
        model = build_segmentor(config)
    assert model.config.width == width
    assert model.classifier.in_channels == width


def test_resolved_config_holds_the_backbones_mean_and_std() -> None:
    config = tiny_segmentor(PVT).config
    assert config.mean == (0.485, 0.456, 0.406)
    assert config.std == (0.229, 0.224, 0.225)


def test_parts_added_to_vit_large_stay_under_25_million_parameters() -> None:
    with torch.device("meta"):
        model = build_segmentor(SegmentorConfig(backbone="vit_large_patch16_224", num_classes=150))
    added = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone."))
    assert added < 25_000_000


def gigaflops(monkeypatch: pytest.MonkeyPatch, backbone: str, **switches: Any) -> float:
    """Of one 512 x 512 image with 150 classes, a multiplication and an addition counted as two."""
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_kwargs: contextlib.nullcontext())  # meta has none
    with torch.device("meta"):
        model = build_segmentor(SegmentorConfig(backbone=backbone, num_classes=150, **switches)).eval()
        with FlopCounterMode(display=False) as counter:
            model.forward_stride(torch.zeros(1, 3, 512, 512))
    return counter.get_total_flops() / 1e9


@pytest.mark.parametrize("separation", ["local", "region"])
def test_cost_on_vit_base_is_at_most_a_quarter_more_than_a_linear_heads(
    monkeypatch: pytest.MonkeyPatch, separation: str
) -> None:
    baseline = gigaflops(monkeypatch, "vit_base_patch16_224", **BASELINE)
    assert 214 < baseline < 216
    assert baseline < gigaflops(monkeypatch, "vit_base_patch16_224", separation=separation) < 1.25 * baseline


@pytest.mark.parametrize(("backbone", "limit"), [("swin_tiny_patch4_window7_224", 62.4), ("pvt_v2_b0", 18.0)])
def test_cost_on_pyramids_is_below_that_of_a_segformer_head(
    monkeypatch: pytest.MonkeyPatch, backbone: str, limit: float
) -> None:
    assert gigaflops(monkeypatch, backbone) < limit


def test_control_without_attention_supervision_lacks_only_what_its_losses_read() -> None:
    model = tiny_segmentor(attention_supervision=False).train()
    aux = model(random_images(1, 32, 32)).aux
    assert aux is not None
    assert {f.name for f in fields(aux) if getattr(aux, f.name) is None} == {
        "attention_BKhw",
        "identity_BK",
        "regions_BKD",
    }
    assert set(tiny_segmentor().for_inference().state_dict()) == set(model.for_inference().state_dict())


def test_a_fixed_size_that_the_stride_does_not_divide_is_refused() -> None:
    args = {**VIT.backbone_args, "img_size": 70, "dynamic_img_size": False}
    with pytest.raises(ValueError, match=r"takes 70 x 70 pixels only, which stride 8 does not divide"):
        build_segmentor(replace(PATCH_14, backbone_args=args))
