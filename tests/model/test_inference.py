"""Whole images and sliding windows: both give what the model gives.

Shapes: B batch, K classes, H x W pixels, h x w grid at stride s.
"""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repsep_model import Segmentor, segment_image
from repsep_model import inference as inference_module
from repsep_model.images import UInt8
from repsep_model.inference import _starts, _upsampled, canvas_multiple, fill_colour, segment_batch
from tests.model.tiny import PVT, VIT, K, random_images, tiny_segmentor

STRIDE = 8


def picture(height: int, width: int) -> UInt8:
    image: UInt8 = random_images(1, height, width)[0].permute(1, 2, 0).contiguous().numpy()
    return image


def colourful(height: int, width: int) -> UInt8:
    """Smooth enough that the mean of a cell says something."""
    coarse = torch.from_numpy(picture(height // 24 + 2, width // 24 + 2)).permute(2, 0, 1)[None].float()
    full = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255)
    image: UInt8 = full[0].permute(1, 2, 0).to(torch.uint8).contiguous().numpy()
    return image


class CellColours:
    """Stands in for a segmentor that sees one cell at a time: three classes, whose logits are the cell's mean colour.

    What windows give must then equal what the whole image gives, exactly but for the order of sums.
    """

    training = False

    def __init__(self, window: int) -> None:
        self.config = SimpleNamespace(stride=STRIDE, num_classes=3, window=window)
        self.multiple = 16
        self.mean = torch.tensor([120.0, 110.0, 100.0]).view(1, 3, 1, 1)
        self.shapes: list[tuple[int, ...]] = []

    def forward_stride(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        return F.avg_pool2d(images.float(), STRIDE) / 20


def segment_stand_in(window: int, image: UInt8, **options: Any) -> inference_module.Segmentation:
    stand_in: Any = CellColours(window)
    return segment_image(stand_in, image, **options)


@pytest.fixture(scope="module")
def vit() -> Segmentor:
    return tiny_segmentor(window=96).for_inference()


@pytest.mark.parametrize("size", [(97, 131), (64, 96), (1, 1), (5, 300)])
def test_result_has_the_size_of_the_image(vit: Segmentor, size: tuple[int, int]) -> None:
    for budget in (10**9, 0):
        found = segment_image(vit, picture(*size), pixel_budget=budget)
        assert found.labels.shape == found.confidence.shape == size
        assert found.labels.dtype == np.uint8
        assert found.confidence.dtype == np.float32
        assert found.labels.max() < K
        assert (found.confidence >= 1 / K).all()
        assert (found.confidence <= 1).all()


@pytest.mark.parametrize("config", [VIT, PVT], ids=["vit", "pyramid"])
@torch.no_grad()
def test_whole_image_gives_the_models_own_labels_and_probabilities(config: Any) -> None:
    model = tiny_segmentor(config).for_inference()
    image = picture(64, 96)
    confidence, labels = model(torch.from_numpy(image).permute(2, 0, 1)[None]).logits[0].softmax(dim=0).max(dim=0)
    found = segment_image(model, image)
    np.testing.assert_array_equal(found.labels, labels.numpy())
    np.testing.assert_array_equal(found.confidence, confidence.numpy())
    assert len(np.unique(found.labels)) > 1


def test_one_window_that_covers_the_image_gives_what_the_whole_image_gives(vit: Segmentor) -> None:
    image = picture(96, 96)
    whole, window = segment_image(vit, image), segment_image(vit, image, pixel_budget=0)
    np.testing.assert_array_equal(window.labels, whole.labels)
    np.testing.assert_allclose(window.confidence, whole.confidence, rtol=1e-5)
    assert len(np.unique(whole.labels)) > 1


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("size", [(96, 96), (96, 256), (288, 160), (352, 352)])
def test_windows_are_put_together_without_a_seam(size: tuple[int, int], overlap: float) -> None:
    image = colourful(*size)
    whole = segment_stand_in(96, image)
    windows = segment_stand_in(96, image, pixel_budget=0, overlap=overlap)
    np.testing.assert_allclose(windows.confidence, whole.confidence, rtol=1e-4)
    np.testing.assert_array_equal(windows.labels[whole.confidence > 0.505], whole.labels[whole.confidence > 0.505])
    assert len(np.unique(whole.labels)) == 3


def test_windows_of_an_odd_size_agree_with_the_whole_away_from_the_padded_edge() -> None:
    image = colourful(203, 261)
    whole, windows = segment_stand_in(96, image), segment_stand_in(96, image, pixel_budget=0)
    inside = (slice(0, 203 - STRIDE), slice(0, 261 - STRIDE))
    np.testing.assert_allclose(windows.confidence[inside], whole.confidence[inside], rtol=1e-4)


def test_every_window_has_one_shape_and_images_over_the_budget_only_go_by_windows() -> None:
    stand_in: Any = CellColours(100)
    segment_image(stand_in, colourful(203, 261), pixel_budget=203 * 261 - 1)
    assert set(stand_in.shapes) == {(1, 3, 96, 96)}
    whole: Any = CellColours(100)
    segment_image(whole, colourful(203, 261), pixel_budget=203 * 261)
    assert whole.shapes == [(1, 3, 224, 288)]


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize(("height", "width"), [(203, 261), (208, 264), (201, 257)])
@pytest.mark.parametrize("cuts", [[], [9], [1, 2, 3], [5, 20, 25]])
def test_upsampled_bands_equal_interpolating_the_whole(
    monkeypatch: pytest.MonkeyPatch, cuts: list[int], height: int, width: int, chunk_rows: int
) -> None:
    monkeypatch.setattr(inference_module, "UPSAMPLE_BYTES", 4 * K * width * chunk_rows)
    torch.manual_seed(0)
    grid = torch.randn(K, 26, 33)
    whole = F.interpolate(grid[None], scale_factor=STRIDE, mode="bilinear", align_corners=False)[0, :, :height, :width]
    given = torch.zeros(height, dtype=torch.bool)
    bounds = [0, *cuts, 26]
    for first, last in pairwise(bounds):
        shared = max(0, first - 1)  # a band begins with the last row of the one before
        for top, rows in _upsampled(grid[:, shared:last], shared, STRIDE, height, width):
            torch.testing.assert_close(rows, whole[:, top : top + rows.shape[1]])
            assert rows.shape[1] <= chunk_rows
            given[top : top + rows.shape[1]] = True
    assert given.all()


def test_rows_of_a_window_below_the_image_are_interpolated_but_not_given() -> None:
    grid = torch.randn(K, 12, 12)
    whole = F.interpolate(grid[None], scale_factor=STRIDE, mode="bilinear", align_corners=False)[0]
    rows = torch.cat([rows for _, rows in _upsampled(grid, 0, STRIDE, 61, 96)], dim=1)
    torch.testing.assert_close(rows, whole[:, :61])


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("cells", [1, 4, 12])
@pytest.mark.parametrize("length", [1, 4, 5, 12, 13, 100])
def test_window_starts_cover_everything_and_overlap_as_asked(length: int, cells: int, overlap: float) -> None:
    starts = _starts(length, cells, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - cells)
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps <= max(1, round(cells * (1 - overlap)))).all()


def test_batch_gives_what_each_image_gives_alone(vit: Segmentor) -> None:
    images = random_images(3, 64, 96)
    labels, confidence = segment_batch(vit, images)
    assert (labels.dtype, confidence.dtype) == (torch.uint8, torch.float32)
    for image, label, share in zip(images, labels, confidence, strict=True):
        alone = segment_image(vit, image.permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(label.numpy(), alone.labels)
        np.testing.assert_allclose(share.numpy(), alone.confidence, rtol=1e-5)


@pytest.mark.parametrize("budget", [10**9, 0])
def test_bfloat16_gives_nearly_the_same_confidence(vit: Segmentor, budget: int) -> None:
    image = picture(96, 160)
    exact = segment_image(vit, image, pixel_budget=budget)
    half = segment_image(vit, image, pixel_budget=budget, dtype=torch.bfloat16)
    assert 0 < np.abs(half.confidence - exact.confidence).max() < 0.1
    assert half.confidence.dtype == np.float32


@pytest.mark.parametrize("budget", [10**9, 0])
def test_read_only_and_mirrored_images_are_taken(vit: Segmentor, budget: int) -> None:
    image = picture(64, 96)
    mirrored = segment_image(vit, image[:, ::-1].copy(), pixel_budget=budget)
    view = image[:, ::-1]
    view.flags.writeable = False
    found = segment_image(vit, view, pixel_budget=budget)
    np.testing.assert_array_equal(found.labels, mirrored.labels)


def test_segmenting_leaves_the_image_as_it_was(vit: Segmentor) -> None:
    image = picture(97, 131)
    before = image.copy()
    for budget in (10**9, 0):
        segment_image(vit, image, pixel_budget=budget)
    np.testing.assert_array_equal(image, before)


def test_canvas_sides_suit_the_model() -> None:
    assert canvas_multiple(tiny_segmentor(VIT)) == 32
    assert canvas_multiple(tiny_segmentor(VIT, backbone="vit_small_patch14_reg4_dinov2")) == 7 * 32


def test_fill_is_the_models_mean_colour() -> None:
    assert fill_colour(tiny_segmentor(mean=(0.1, 0.5, 1.0))) == (26, 128, 255)
