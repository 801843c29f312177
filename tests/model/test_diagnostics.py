"""Every measure against loops over locations and pairs; the report against the measures of maps taken by hand.

Shapes: B batch, C channels, h x w grid, N = h * w, K classes.
"""

import copy
import math
from dataclasses import asdict, replace
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repsep_model import Segmentor, separation_report
from repsep_model.diagnostics import (
    MEASURES,
    MapMeasures,
    SeparationReport,
    class_distance_ratio,
    class_margin,
    edge_contrast,
    effective_rank,
    high_frequency_share,
    mean_report,
    mean_similarity,
)
from repsep_model.labels import IGNORE_INDEX, majority_reduce
from tests.model.tiny import FAMILIES, PVT, VIT, K, family_segmentor, random_images, random_labels, tiny_segmentor

OURS = ["P0", "P1", "P2", "P3", "P4", "F", "F'", "embed"]
UNLABELLED = (mean_similarity, effective_rank, high_frequency_share)
LABELLED = (class_distance_ratio, class_margin, edge_contrast)


def random_maps(B: int = 2, C: int = 4, h: int = 3, w: int = 5) -> Tensor:
    """With an offset, as real maps have: raw and centred measures differ."""
    return torch.randn(B, C, h, w, generator=torch.Generator().manual_seed(0)) + torch.arange(C).view(1, C, 1, 1) / 2


def grid_labels() -> Tensor:
    """(2, 3, 5): three classes, a row of the first image ignored."""
    labels = torch.randint(0, 3, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    labels[0, 0] = IGNORE_INDEX
    return labels


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def members(image: Tensor, mask: Tensor) -> dict[int, list[Tensor]]:
    """The vectors of each class."""
    h, w = mask.shape
    found: dict[int, list[Tensor]] = {}
    for y, x in [(y, x) for y in range(h) for x in range(w) if mask[y, x] != IGNORE_INDEX]:
        found.setdefault(int(mask[y, x]), []).append(image[:, y, x])
    return found


@pytest.mark.parametrize("centred", [False, True])
def test_mean_similarity_equals_all_pairs_of_different_locations(centred: bool) -> None:
    maps = random_maps()
    expected = []
    for image in maps.flatten(2):
        vectors = image - image.mean(dim=1, keepdim=True) if centred else image
        expected.append(average([cosine(vectors[:, i], vectors[:, j]) for i, j in permutations(range(15), 2)]))
    assert mean_similarity(maps, centred=centred).tolist() == pytest.approx(expected, rel=1e-4)


def test_alike_locations_have_similarity_one_and_opposite_ones_less_than_zero() -> None:
    assert float(mean_similarity(torch.ones(1, 4, 3, 3))) == pytest.approx(1)
    opposite = torch.ones(1, 4, 1, 2)
    opposite[..., 1] = -3
    assert float(mean_similarity(opposite)) == pytest.approx(-1)


def test_what_locations_have_in_common_counts_in_raw_similarity_only() -> None:
    apart, alike = random_maps(1), random_maps(1) + 100
    assert float(mean_similarity(alike)) > 0.99 > float(mean_similarity(apart))
    assert float(mean_similarity(alike, centred=True)) == pytest.approx(
        float(mean_similarity(apart, centred=True)), abs=1e-4
    )


def test_locations_that_are_zero_enter_no_pair() -> None:
    maps = random_maps(1)
    assert float(mean_similarity(F.pad(maps, (0, 2)))) == pytest.approx(float(mean_similarity(maps)), rel=1e-5)
    lone = F.pad(torch.randn(64, 33, 1, 1, generator=torch.Generator().manual_seed(0)), (0, 6))
    assert mean_similarity(lone).isnan().all()


def test_effective_rank_equals_the_entropy_of_the_singular_values_of_the_centred_matrix() -> None:
    maps, expected = random_maps(), []
    for image in maps.flatten(2).double():
        vectors = (image - image.mean(dim=1, keepdim=True)).T  # N x C
        shares = [s / float(sum(torch.linalg.svdvals(vectors))) for s in torch.linalg.svdvals(vectors).tolist()]
        expected.append(math.exp(-sum(p * math.log(p) for p in shares)))
    assert effective_rank(maps).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_equal_spread_along_some_directions_has_their_number_as_rank_whatever_is_in_common(rank: int) -> None:
    directions = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0][:rank]
    vectors = torch.cat([directions, -directions]).T + 5
    assert float(effective_rank(vectors.view(1, 6, 2, rank))) == pytest.approx(rank, rel=1e-5)


@pytest.mark.parametrize(("h", "w"), [(3, 5), (8, 6), (1, 7)])
def test_high_frequency_share_equals_that_of_the_fourier_transform_of_the_mirrored_map(h: int, w: int) -> None:
    maps = random_maps(2, 4, h, w)
    vertical = torch.cat([maps, maps.flip(2)], dim=2).double()
    energy = torch.fft.fft2(torch.cat([vertical, vertical.flip(3)], dim=3)).abs().square().sum(dim=1)
    y, x = torch.fft.fftfreq(2 * h), torch.fft.fftfreq(2 * w)  # waves per location, Nyquist 1/2
    high = torch.maximum(y.abs()[:, None], x.abs()) > 1 / 4
    energy[:, 0, 0] = 0
    expected = energy[:, high].sum(dim=1) / energy.sum(dim=(1, 2))
    assert high_frequency_share(maps).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_slope_and_an_upsampled_map_have_next_to_no_high_frequencies_and_a_chessboard_nearly_nothing_else() -> None:
    slope = torch.arange(12.0).repeat(1, 1, 12, 1)
    upsampled = F.interpolate(random_maps(1, 4, 16, 16), scale_factor=2, mode="bilinear", align_corners=False)
    chessboard = torch.tensor([1.0, -1.0]).repeat(6).outer(torch.tensor([1.0, -1.0]).repeat(6))[None, None]
    assert float(high_frequency_share(slope)) < 0.01
    assert float(high_frequency_share(upsampled)) < 0.05
    assert float(high_frequency_share(chessboard)) > 0.95


def test_class_distance_ratio_equals_brute_force() -> None:
    maps, labels = random_maps(), grid_labels()
    expected = []
    for image, mask in zip(maps, labels, strict=True):
        classes = members(image, mask)
        centres = {k: torch.stack(vectors).mean(dim=0) for k, vectors in classes.items()}
        within = [float((z - centres[k]).norm()) for k, vectors in classes.items() for z in vectors]
        between = [float((a - b).norm()) for a, b in combinations(centres.values(), 2)]
        assert len(between) == 3
        expected.append(average(within) / average(between))
    assert class_distance_ratio(maps, labels).tolist() == pytest.approx(expected, rel=1e-5)


def test_class_margin_equals_brute_force() -> None:
    maps, labels = random_maps(), grid_labels()
    expected = []
    for image, mask in zip(maps, labels, strict=True):
        unit = {k: [F.normalize(z, dim=0) for z in vectors] for k, vectors in members(image, mask).items()}
        centres = {k: torch.stack(vectors).mean(dim=0) for k, vectors in unit.items()}
        within = [average([cosine(centres[k], z) for z in vectors]) for k, vectors in unit.items()]
        expected.append(average(within) - average([cosine(a, b) for a, b in combinations(centres.values(), 2)]))
    assert class_margin(maps, labels).tolist() == pytest.approx(expected, rel=1e-5)


def test_edge_contrast_equals_brute_force() -> None:
    maps, labels = random_maps(2, 4, 4, 6), torch.randint(0, 2, (2, 4, 6), generator=torch.Generator().manual_seed(2))
    labels[:, 1, 2] = IGNORE_INDEX
    expected = []
    for image, mask in zip(maps, labels, strict=True):
        contrasts = []
        for y, x in [(y, x) for y in range(4) for x in range(6) if mask[y, x] != IGNORE_INDEX]:
            around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
            around = [(j, i) for j, i in around if 0 <= j < 4 and 0 <= i < 6 and mask[j, i] != IGNORE_INDEX]
            same = [cosine(image[:, y, x], image[:, j, i]) for j, i in around if mask[j, i] == mask[y, x]]
            other = [cosine(image[:, y, x], image[:, j, i]) for j, i in around if mask[j, i] != mask[y, x]]
            if same and other:
                contrasts.append(average(same) - average(other))
        assert 0 < len(contrasts) < 23
        expected.append(average(contrasts))
    assert edge_contrast(maps, labels).tolist() == pytest.approx(expected, rel=1e-4)


def test_separate_classes_have_a_low_distance_ratio_and_a_high_margin_and_edge_contrast() -> None:
    labels = torch.zeros(1, 4, 6, dtype=torch.int64)
    labels[..., 3:] = 1
    one_hot = F.one_hot(labels, 2).permute(0, 3, 1, 2).float()
    assert float(class_distance_ratio(one_hot, labels)) == 0
    assert float(class_margin(one_hot, labels)) == pytest.approx(1)
    assert float(edge_contrast(one_hot, labels)) == pytest.approx(1)
    mixed = one_hot + torch.rand(1, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    assert float(class_distance_ratio(mixed, labels)) > 0.2
    assert float(class_margin(mixed, labels)) < 0.9
    assert float(edge_contrast(mixed, labels)) < 0.9


@pytest.mark.parametrize("measure", LABELLED, ids=lambda m: m.__name__)
def test_an_image_of_one_class_or_none_gives_nan_and_leaves_its_neighbours_in_the_batch_alone(measure: Any) -> None:
    maps, labels = random_maps(4), grid_labels().repeat(2, 1, 1)
    labels[1], labels[2] = 2, IGNORE_INDEX
    found = measure(maps, labels)
    assert found.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(found[[0, 3]], measure(maps[[0, 3]], labels[[0, 3]]), rtol=1e-5, atol=0)


def test_a_map_of_one_location_has_nothing_to_measure() -> None:
    assert all(measure(torch.ones(1, 4, 1, 1)).isnan().all() for measure in UNLABELLED)
    assert mean_similarity(torch.ones(1, 4, 1, 1), centred=True).isnan().all()
    assert all(measure(torch.ones(1, 4, 1, 1), torch.zeros(1, 1, 1)).isnan().all() for measure in LABELLED)


def test_what_rounding_leaves_of_a_constant_map_is_not_measured() -> None:
    maps = torch.full((1, 4, 7, 9), 0.1)
    maps[:, 1] = 1e4 / 3
    labels = torch.randint(0, 3, (1, 7, 9))
    assert mean_similarity(maps, centred=True).isnan().all()
    assert effective_rank(maps).isnan().all()
    assert high_frequency_share(maps).isnan().all()
    assert class_distance_ratio(maps, labels).isnan().all()
    assert float(edge_contrast(maps, labels)) == pytest.approx(0, abs=1e-6)


def test_bfloat16_maps_are_measured_in_float32() -> None:
    maps, labels = random_maps(2, 4, 12, 12).bfloat16(), torch.randint(0, 3, (2, 12, 12))
    for measure in UNLABELLED:
        torch.testing.assert_close(measure(maps), measure(maps.float()), rtol=0, atol=0)
    for measure in LABELLED:
        torch.testing.assert_close(measure(maps, labels), measure(maps.float(), labels), rtol=0, atol=0)


def test_a_report_measures_every_block_and_every_module_of_ours() -> None:
    args = VIT.backbone_args | {"depth": 7}
    maps = separation_report(
        tiny_segmentor(backbone_args=args), random_images(1, 64, 64), random_labels(1, 64, 64)
    ).maps
    assert list(maps) == [*(f"block {m}" for m in range(1, 8)), *OURS]
    assert [m.stride for m in maps.values()] == [16] * 7 + [8] * 8


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"local_pathway": False, "separation": "none", "cross_attention": 0}, set(OURS) - {"F"}),
        ({"local_pathway": False}, {"P0", "P1", "P2", "P3", "P4"}),
        ({"separation": "none"}, {"F'"}),
        ({"separation": "local", "cross_attention": 0}, {"embed"}),
    ],
)
def test_modules_that_a_model_lacks_have_no_row(changes: dict[str, Any], lacking: set[str]) -> None:
    report = separation_report(tiny_segmentor(**changes), random_images(1, 64, 64), random_labels(1, 64, 64))
    assert list(report.maps) == [*(f"block {m}" for m in range(1, 5)), *(n for n in OURS if n not in lacking)]


def test_stages_of_a_pyramid_are_measured_on_their_own_grids_finer_and_coarser_than_the_stride() -> None:
    model, labels = tiny_segmentor(PVT).eval(), random_labels(1, 128, 160)
    maps = separation_report(model, random_images(1, 128, 160), labels).maps
    assert [(name, m.stride) for name, m in maps.items()][:4] == [(f"stage {m}", 2 ** (m + 1)) for m in range(1, 5)]
    with torch.no_grad():
        taps = model.features(random_images(1, 128, 160)).taps
    for name, tap, stride in zip(list(maps)[:4], taps, (4, 8, 16, 32), strict=True):
        assert maps[name] == measured(tap, majority_reduce(labels, stride, K), stride)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_and_stages_of_every_family_agree_with_its_taps(family: str) -> None:
    model, images, labels = family_segmentor(family).eval(), random_images(1, 50, 70), random_labels(1, 50, 70)
    maps = separation_report(model, images, labels).maps
    with torch.no_grad():
        taps = model.features(images).taps
    layers = [m for name, m in maps.items() if name not in OURS]
    assert len(layers) == 4
    for layer, tap, stride in zip(layers, taps, model.backbone.strides, strict=True):
        reduced = majority_reduce(labels, stride, K)
        inside = tap[..., : reduced.shape[1], : reduced.shape[2]]
        assert layer.stride == stride
        assert layer.similarity == pytest.approx(float(mean_similarity(inside)), rel=1e-5)
        assert layer.edge_contrast == pytest.approx(float(edge_contrast(inside, reduced)), rel=1e-5, nan_ok=True)


def measured(maps: Tensor, labels: Tensor, stride: int) -> MapMeasures:
    return MapMeasures(
        stride=stride,
        similarity=float(mean_similarity(maps)),
        centred_similarity=float(mean_similarity(maps, centred=True)),
        effective_rank=float(effective_rank(maps)),
        high_frequency=float(high_frequency_share(maps)),
        distance_ratio=float(class_distance_ratio(maps, labels)),
        class_margin=float(class_margin(maps, labels)),
        edge_contrast=float(edge_contrast(maps, labels)),
    )


def test_rows_hold_the_measures_of_the_maps_that_the_forward_makes() -> None:
    model, images, labels = tiny_segmentor().eval(), random_images(1, 96, 64), random_labels(1, 96, 64)
    maps = separation_report(model, images, labels).maps
    with torch.no_grad():
        pixels = (images.float() - model.mean) / model.std
        found = model.features(images)
        pathway, attention = model.local_pathway, model.cross_attention
        assert pathway is not None
        assert attention is not None
        expected = {f"block {m}": tap for m, tap in enumerate(found.taps, 1)}
        expected["P0"] = pathway.stem(pixels)
        for m in range(1, 5):
            expected[f"P{m}"] = pathway.blocks[m - 1](expected[f"P{m - 1}"], found.taps[m - 1])
        expected |= {"F": found.fused_BDhw, "F'": found.separated_BDhw}
        expected["embed"] = attention.embed(found.separated_BDhw)
    assert list(maps) == list(expected)
    for name, found_maps in expected.items():
        stride = 16 if name.startswith("block") else 8
        assert asdict(maps[name]) == pytest.approx(
            asdict(measured(found_maps, majority_reduce(labels, stride, K), stride)), rel=1e-4
        )
    assert len({m.class_margin for m in maps.values()}) == 12


def test_the_padded_border_is_never_measured() -> None:
    model, images, labels = tiny_segmentor(stride=4).eval(), random_images(1, 41, 73), random_labels(1, 41, 73)
    with torch.no_grad():
        padded = model.features(images).fused_BDhw
    assert padded.shape[2:] == (12, 20)
    reduced = majority_reduce(labels, 4, K)
    assert separation_report(model, images, labels).maps["F"] == measured(padded[..., :11, :19], reduced, 4)


def modes(model: Segmentor) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_a_report_measures_in_eval_mode_at_odd_size_and_leaves_the_model_as_it_was(training: bool) -> None:
    model = tiny_segmentor(drop_path=0.9, backbone_args=VIT.backbone_args | {"depth": 5}).train(training)
    model.backbone.eval()  # as a frozen backbone is
    before, weights = modes(model), copy.deepcopy(model.state_dict())
    images, labels = random_images(2, 97, 131), random_labels(2, 97, 131)
    reports = [separation_report(model, images, labels) for _ in range(2)]
    assert reports[0] == reports[1] == separation_report(copy.deepcopy(model).eval(), images, labels)
    assert modes(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for row in reports[0].maps.values():
        assert all(math.isfinite(value) for value in asdict(row).values())


def test_a_forward_that_fails_leaves_neither_hooks_nor_another_mode() -> None:
    model = tiny_segmentor().train()
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\)"):
        separation_report(model, torch.zeros(1, 4, 32, 32), torch.zeros(1, 32, 32))
    assert all(modes(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_labels_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels \(1, 32, 40\) do not fit images \(1, 3, 32, 32\)"):
        separation_report(tiny_segmentor(), random_images(1, 32, 32), random_labels(1, 32, 40))


def test_report_of_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="pass at least one image"):
        separation_report(tiny_segmentor(), random_images(0, 32, 32), random_labels(0, 32, 32))


def test_the_inference_form_gives_the_same_report_also_under_autocast() -> None:
    model, images, labels = tiny_segmentor(), random_images(1, 64, 64), random_labels(1, 64, 64)
    expected = separation_report(model, images, labels)
    assert separation_report(model.for_inference(), images, labels) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert separation_report(model, images, labels) == expected


def test_a_batch_gives_the_mean_over_its_images_without_those_that_have_nothing_to_measure() -> None:
    model, images, labels = tiny_segmentor(), random_images(3, 64, 64), random_labels(3, 64, 64)
    labels[1] = IGNORE_INDEX
    singles = [separation_report(model, images[i : i + 1], labels[i : i + 1]) for i in range(3)]
    together = separation_report(model, images, labels)
    assert together == mean_report(singles)
    for name, row in together.maps.items():
        for measure in MEASURES:
            values = [getattr(single.maps[name], measure) for single in singles]
            assert math.isnan(values[1]) == (measure in ("distance_ratio", "class_margin", "edge_contrast"))
            assert getattr(row, measure) == pytest.approx(average([v for v in values if not math.isnan(v)]))


def test_a_report_on_ignored_labels_has_the_measures_without_labels_only() -> None:
    report = separation_report(tiny_segmentor(), random_images(1, 64, 64), torch.full((1, 64, 64), IGNORE_INDEX))
    assert math.isnan(report.margin_gain)
    for row in report.maps.values():
        found = {measure for measure in MEASURES if not math.isnan(getattr(row, measure))}
        assert found == {"similarity", "centred_similarity", "effective_rank", "high_frequency"}


def test_margin_gain_is_what_separation_adds_to_the_class_margin() -> None:
    fused = MapMeasures(stride=8, **dict.fromkeys(MEASURES, 0.5))
    assert SeparationReport({"F": fused, "F'": replace(fused, class_margin=0.75)}).margin_gain == 0.25
    assert SeparationReport({"F": fused}).margin_gain == 0
