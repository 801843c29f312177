"""Whole images and sliding windows: both give what the model gives.

Shapes: B batch, K classes, H x W pixels, h x w grid at stride s.
"""

import math
import tracemalloc
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from repsep_model import Segmentor, segment_image
from repsep_model import inference as inference_module
from repsep_model.images import UInt8
from repsep_model.inference import (
    _scaled,
    _starts,
    _View,
    canvas_multiple,
    fill_colour,
    fits_whole,
    segment_batch,
    window_side,
)
from repsep_model.transforms import canvas
from tests.model.tiny import PVT, VIT, K, family_segmentor, random_images, tiny_segmentor

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
        self.fixed_window = None
        self.plain = False
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
    np.testing.assert_allclose(found.confidence, confidence.numpy(), rtol=1e-5)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_that_go_together_give_what_each_gives_alone(
    vit: Segmentor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, found = picture(150, 500), []
    for at_once in (1, 2, 16):
        monkeypatch.setattr(inference_module, "WINDOWED_PIXELS", {"cpu": at_once * 96 * 96})
        found.append(segment_image(vit, image, dtype=dtype))
    for other in found[1:]:
        np.testing.assert_allclose(other.confidence, found[0].confidence, atol=1e-5 if dtype == torch.float32 else 0.02)


def test_no_more_windows_go_together_than_their_pixels_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_module, "WINDOWED_PIXELS", {"cpu": 3 * 96 * 96})
    stand_in: Any = CellColours(96)
    segment_image(stand_in, colourful(96, 96 * 7), pixel_budget=0, overlap=0)
    assert [shape[0] for shape in stand_in.shapes] == [3, 3, 1]
    huge: Any = CellColours(960)
    segment_image(huge, colourful(96, 1920), pixel_budget=0, overlap=0)
    assert [shape[0] for shape in huge.shapes] == [1, 1], "a window over the limit goes alone"


def test_without_a_budget_a_plain_vit_takes_only_what_its_window_holds() -> None:
    vit, pyramid = (tiny_segmentor(config, window=96).for_inference() for config in (VIT, PVT))
    assert fits_whole(vit, 96, 96, None)
    assert fits_whole(vit, 40, 96, None)
    assert not fits_whole(vit, 40, 97, None)
    assert fits_whole(vit, 40, 97, 40 * 97), "a budget of one's own is taken as it is"
    assert fits_whole(pyramid, 2048, 2048, None)
    assert not fits_whole(pyramid, 2048, 2049, None)


def test_every_window_has_one_shape_and_images_over_the_budget_only_go_by_windows() -> None:
    stand_in: Any = CellColours(100)
    segment_image(stand_in, colourful(203, 261), pixel_budget=203 * 261 - 1)
    assert {shape[1:] for shape in stand_in.shapes} == {(3, 96, 96)}
    whole: Any = CellColours(100)
    segment_image(whole, colourful(203, 261), pixel_budget=203 * 261)
    assert whole.shapes == [(1, 3, 224, 288)]


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize(("height", "width"), [(203, 261), (208, 264), (201, 257)])
@pytest.mark.parametrize("cuts", [[], [9], [1, 2, 3], [5, 20, 25]])
def test_rows_read_from_bands_equal_interpolating_the_whole(
    cuts: list[int], height: int, width: int, chunk_rows: int
) -> None:
    torch.manual_seed(0)
    grid = torch.randn(K, 26, 33)
    whole = F.interpolate(grid[None], scale_factor=STRIDE, mode="bilinear", align_corners=False)[0, :, :height, :width]
    bands = (grid[:, first:last] for first, last in pairwise([0, *cuts, 26]))
    view = _View(bands, STRIDE, (height, width), (height, width), mirrored=False)
    rows = [view.read(top, min(top + chunk_rows, height)) for top in range(0, height, chunk_rows)]
    torch.testing.assert_close(torch.cat(rows, dim=1), whole)


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.5, 1.75])
def test_a_scaled_views_grid_is_interpolated_once_to_the_images_own_pixels(scale: float) -> None:
    """A plane, linear in y and x of the image, must come back as that plane wherever the grid does not end."""
    height, width = 96, 128
    seen = (round(height * scale), round(width * scale))
    y, x = (((torch.arange(-(-side // STRIDE)) + 0.5) * STRIDE / scale) for side in seen)
    grid = torch.stack([y[:, None].expand(-1, len(x)), x[None].expand(len(y), -1)])
    view = _View(iter([grid]), STRIDE, seen, (height, width), mirrored=False)
    rows = view.read(0, height)
    inner_y, inner_x = (slice(math.ceil(STRIDE / scale), -math.ceil(STRIDE / scale)) for _ in range(2))
    expected_y, expected_x = (torch.arange(side) + 0.5 for side in (height, width))
    found = rows[:, inner_y, inner_x]
    torch.testing.assert_close(found[0], expected_y[inner_y, None].expand_as(found[0]))
    torch.testing.assert_close(found[1], expected_x[None, inner_x].expand_as(found[1]))


def test_several_views_average_probabilities_not_labels_and_mirror_back(vit: Segmentor) -> None:
    image = colourful(128, 256)
    total = torch.zeros(K, 128, 256)
    for scale in (0.75, 1.0, 1.25):
        scaled = _scaled(image, scale)
        for mirrored in (False, True):
            pixels = scaled[:, ::-1].copy() if mirrored else scaled.copy()
            with torch.no_grad():
                logits = vit.forward_stride(torch.from_numpy(pixels).permute(2, 0, 1)[None])
            # Nothing is padded at these sizes: one sampling of the grid at the image's pixels.
            y = (torch.arange(128) + 0.5) / 128 * 2 - 1
            x = (torch.arange(256) + 0.5) / 256 * 2 - 1
            places = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=2)[None]
            full = F.grid_sample(logits, places, mode="bilinear", padding_mode="border", align_corners=False)[0]
            total += (full.flip(2) if mirrored else full).softmax(dim=0)
    confidence, labels = (total / 6).max(dim=0)
    found = segment_image(vit, image, scales=(0.75, 1.0, 1.25), flip=True, pixel_budget=10**9)
    np.testing.assert_allclose(found.confidence, confidence.numpy(), rtol=1e-4)
    assert (found.labels == labels.numpy()).mean() > 0.999


def test_a_mirrored_image_gives_mirrored_labels_when_both_views_are_averaged(vit: Segmentor) -> None:
    image = colourful(96, 160)
    for budget in (10**9, 0):
        found = segment_image(vit, image, flip=True, pixel_budget=budget, overlap=0.5)
        mirrored = segment_image(vit, image[:, ::-1], flip=True, pixel_budget=budget, overlap=0.5)
        np.testing.assert_allclose(mirrored.confidence[:, ::-1], found.confidence, rtol=1e-4)
        assert (mirrored.labels[:, ::-1] == found.labels).mean() > 0.999


def test_scaled_windows_agree_with_the_scaled_whole() -> None:
    image = colourful(192, 256)
    whole = segment_stand_in(96, image, scales=(0.5, 1.5), pixel_budget=10**9)
    windows = segment_stand_in(96, image, scales=(0.5, 1.5), pixel_budget=0)
    np.testing.assert_allclose(windows.confidence, whole.confidence, rtol=1e-4)
    np.testing.assert_array_equal(windows.labels[whole.confidence > 0.505], whole.labels[whole.confidence > 0.505])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scales": ()}, "scales must be"),
        ({"scales": (1, 0)}, "scales must be"),
        ({"scales": 1.0}, "scales must be"),
        ({"scales": (float("nan"),)}, "scales must be"),
        ({"overlap": 1.0}, "overlap is a"),
        ({"dtype": torch.float16}, "dtype must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(vit: Segmentor, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        segment_image(vit, picture(32, 32), **options)


@pytest.mark.parametrize(
    "image",
    [
        picture(8, 8) / 255,
        picture(8, 8)[..., 0],
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        Image.fromarray(picture(8, 8)),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
    ],
    ids=["float", "grey", "alpha", "channels first", "empty", "PIL", "tensor"],
)
def test_anything_but_a_uint8_rgb_array_is_refused(vit: Segmentor, image: Any) -> None:
    with pytest.raises(ValueError, match=r"pass a numpy array \(H, W, 3\) of uint8"):
        segment_image(vit, image)


@pytest.mark.parametrize("size", [(97, 131), (96, 128), (5, 300)])
def test_one_view_twice_gives_what_it_gives_once(vit: Segmentor, size: tuple[int, int]) -> None:
    image = colourful(*size)
    once, twice = segment_image(vit, image), segment_image(vit, image, scales=(1.0, 1.0))
    np.testing.assert_allclose(twice.confidence, once.confidence, rtol=1e-5)
    np.testing.assert_array_equal(twice.labels, once.labels)


@pytest.mark.parametrize("size", [(97, 131), (90, 121)])
@torch.no_grad()
def test_labels_at_odd_sizes_are_those_of_the_models_own_logits(vit: Segmentor, size: tuple[int, int]) -> None:
    image = colourful(*size)
    filled = canvas(image, canvas_multiple(vit), fill_colour(vit))
    logits = vit(torch.from_numpy(filled).permute(2, 0, 1)[None]).logits[0, :, : size[0], : size[1]]
    confidence, labels = logits.softmax(dim=0).max(dim=0)
    found = segment_image(vit, image, pixel_budget=10**9)
    np.testing.assert_allclose(found.confidence, confidence.numpy(), rtol=1e-4)
    assert (found.labels == labels.numpy()).mean() > 0.9999


def test_logits_of_the_whole_image_are_never_held(vit: Segmentor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_module, "UPSAMPLE_BYTES", {"cpu": 4 * K * 131 * 5})
    sizes: list[int] = []
    reader = _View.read
    monkeypatch.setattr(_View, "read", lambda self, *rows: sizes.append((out := reader(self, *rows)).shape[1]) or out)
    segment_image(vit, picture(97, 131))
    segment_batch(vit, random_images(1, 96, 131), [(96, 131)])
    assert max(sizes) == 5
    assert sum(sizes) == 97 + 96


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
    batch = segment_batch(vit, images, [(64, 96)] * 3)
    for image, found in zip(images, batch, strict=True):
        alone = segment_image(vit, image.permute(1, 2, 0).numpy())
        assert (found.labels.dtype, found.confidence.dtype) == (np.uint8, np.float32)
        np.testing.assert_array_equal(found.labels, alone.labels)
        np.testing.assert_allclose(found.confidence, alone.confidence, rtol=1e-5)


def test_of_a_canvas_only_the_image_itself_is_given_and_nothing_of_blanks(vit: Segmentor) -> None:
    images = random_images(4, 64, 96)
    whole = segment_batch(vit, images, [(64, 96)] * 4)
    parts = segment_batch(vit, images, [(50, 96), (64, 70)])
    assert [part.labels.shape for part in parts] == [(50, 96), (64, 70)]
    for part, (height, width), full in zip(parts, [(50, 96), (64, 70)], whole, strict=False):
        np.testing.assert_array_equal(part.labels, full.labels[:height, :width])


@pytest.mark.parametrize("options", [{}, {"pixel_budget": 0}, {"scales": (0.75, 1.0), "flip": True}])
def test_confidence_as_bytes_is_the_probability_times_255_rounded(vit: Segmentor, options: dict[str, Any]) -> None:
    image = colourful(97, 131)
    exact = segment_image(vit, image, **options)
    found = segment_image(vit, image, as_bytes=True, **options)
    assert found.confidence.dtype == np.uint8
    np.testing.assert_array_equal(found.confidence, np.rint(exact.confidence * 255))
    np.testing.assert_array_equal(found.labels, exact.labels)
    assert len(np.unique(found.confidence)) > 20


def test_a_batchs_confidence_as_bytes_is_the_probability_times_255_rounded(vit: Segmentor) -> None:
    images = random_images(3, 64, 96)
    sizes = [(64, 96)] * 3
    for exact, found in zip(
        segment_batch(vit, images, sizes), segment_batch(vit, images, sizes, as_bytes=True), strict=True
    ):
        assert found.confidence.dtype == np.uint8
        np.testing.assert_array_equal(found.confidence, np.rint(exact.confidence * 255))
        np.testing.assert_array_equal(found.labels, exact.labels)


def test_confidence_as_bytes_never_exists_as_float_at_the_images_size(
    vit: Segmentor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_module, "UPSAMPLE_BYTES", {"cpu": 4 * K * 131 * 5})
    tracemalloc.start()  # numpy tells it of its arrays; torch's few rows are not counted
    segment_image(vit, image := picture(970, 1310), pixel_budget=0)
    as_floats = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    segment_image(vit, image, pixel_budget=0, as_bytes=True)
    as_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert as_floats - as_bytes > 2.5 * 970 * 1310


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
    assert canvas_multiple(tiny_segmentor(VIT, backbone="vit_small_patch14_reg4_dinov2")) == 7 * 8


def test_a_backbone_of_one_size_gets_windows_of_that_size_and_smaller_images_whole() -> None:
    model = family_segmentor("BEiTv2 at 64", window=512).for_inference()
    assert window_side(model) == 64
    assert fits_whole(model, 64, 50, 10**9)
    assert not fits_whole(model, 64, 65, 10**9)
    assert not fits_whole(model, 64, 50, 64 * 50 - 1)


def test_fill_is_the_models_mean_colour() -> None:
    assert fill_colour(tiny_segmentor(mean=(0.1, 0.5, 1.0))) == (26, 128, 255)
