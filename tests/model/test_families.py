"""Every backbone family, at every kind of image size, in training and inference: one claim a test.

Shapes: B batch, K classes, H x W pixels, h x w grid at stride s of the padded image.
"""

import pytest
import torch
from torch import Tensor

from repsep_model import LossWeights, Segmentor, segment_image, segmentation_loss
from repsep_model.losses import total_loss
from tests.model.tiny import FAMILIES, K, family_segmentor, random_images, random_labels

SIZES = {"square 224": (224, 224), "not square": (64, 160), "not divisible": (97, 131)}
BASELINE = {"local_pathway": False, "separation": "none", "cross_attention": 0}

matrix = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
families = pytest.mark.parametrize("family", FAMILIES)


def backbone_inputs(model: Segmentor) -> list[Tensor]:
    """What timm's model is given, call by call."""
    seen: list[Tensor] = []
    verb = model.backbone.model.forward_intermediates

    def recorded(images: Tensor, **options: object) -> object:
        seen.append(images)
        return verb(images, **options)

    model.backbone.model.forward_intermediates = recorded
    return seen


@families
@matrix
@torch.no_grad()
def test_inference_gives_finite_logits_of_the_images_size_the_same_each_time(
    family: str, size: tuple[int, int]
) -> None:
    model = family_segmentor(family).for_inference()
    images = random_images(1, *size)
    output = model(images)
    assert output.aux is None
    assert output.logits.shape == (1, K, *size)
    assert output.logits.isfinite().all()
    assert output.logits.std() > 0
    torch.testing.assert_close(model(images).logits, output.logits, rtol=0, atol=0)


@families
@matrix
def test_training_reaches_every_parameter_with_a_finite_gradient(family: str, size: tuple[int, int]) -> None:
    model = family_segmentor(family).train()
    terms = segmentation_loss(model(random_images(2, *size)), random_labels(2, *size), LossWeights())
    total_loss(terms, LossWeights()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@families
@torch.no_grad()
def test_pixels_reach_the_backbone_padded_but_never_resized(family: str) -> None:
    model = family_segmentor(family).for_inference()
    images, seen = random_images(1, 97, 131), backbone_inputs(model)
    model(images)
    height, width = (-(-side // model.multiple) * model.multiple for side in (97, 131))
    expected = model.mean.expand(1, 3, height, width).clone()
    expected[..., :97, :131] = images.float()
    expected = (expected - model.mean) / model.std
    side = model.backbone.window or 0
    tiles = (
        [expected[..., y : y + side, x : x + side] for y in range(0, height, side) for x in range(0, width, side)]
        if side
        else [expected]
    )
    torch.testing.assert_close(torch.cat(seen), torch.cat(tiles), rtol=0, atol=1e-6)


@families
@torch.no_grad()
def test_a_change_in_the_image_shows_at_its_own_place(family: str) -> None:
    """Wrong strides, transposed grids and forgotten prefix tokens move it elsewhere."""
    model = family_segmentor(family, **BASELINE).for_inference()
    stride = model.backbone.strides[-1]
    images = torch.full((1, 3, 6 * stride, 7 * stride), 128.0)
    row, column = 1, 5
    changed = images.clone()
    changed[..., row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] = 255.0
    before, after = model.features(images).taps[-1], model.features(changed).taps[-1]
    difference = (after - before).square().sum(dim=1)[0]
    found = divmod(int(difference.argmax()), difference.shape[1])
    assert max(abs(found[0] - row), abs(found[1] - column)) <= 1


@families
def test_large_images_go_by_windows_of_one_size_that_the_backbone_takes(family: str) -> None:
    model = family_segmentor(family, window=64).for_inference()
    seen = backbone_inputs(model)
    found = segment_image(model, random_images(1, 150, 250)[0].permute(1, 2, 0).contiguous().numpy(), pixel_budget=0)
    assert found.labels.shape == (150, 250)
    assert len({tuple(x.shape[1:]) for x in seen}) == 1


def test_an_image_larger_than_a_fixed_window_is_seen_in_tiles_and_put_together_in_place() -> None:
    backbone = family_segmentor("BEiTv2 at 64").for_inference().backbone
    assert backbone.window == 64
    images = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        whole = backbone(images)
        for row in range(2):
            for column in range(3):
                tile = backbone(images[..., row * 64 : (row + 1) * 64, column * 64 : (column + 1) * 64])
                for tap, part in zip(whole, tile, strict=True):
                    place = tap[..., row * 4 : (row + 1) * 4, column * 4 : (column + 1) * 4]
                    torch.testing.assert_close(place, part, rtol=1e-4, atol=1e-5)


def test_which_families_take_any_size_and_which_do_not() -> None:
    """The answer of the probe on the meta device: a family that became freer in timm shows here."""
    found = {name: (b.multiple, b.window) for name in FAMILIES if (b := family_segmentor(name).backbone)}
    assert found == {
        "ViT": (16, None),
        "DeiT3": (16, None),
        "BEiT": (224, 224),
        "BEiTv2 at 64": (64, 64),
        "EVA-02": (14, None),
        "DINOv2": (14, None),
        "DINOv3": (16, None),
        "Swin": (32, None),
        "PVTv2": (32, None),
        "ConvNeXt": (32, None),
        "MaxViT": (224, None),
    }
