"""Both separation mechanisms: their starting point, and their sums against loops.

Shapes: B batch, D width, K classes, h x w grid, N = h * w.
"""

import pytest
import torch
from torch import Tensor, nn

from repsep_model.layers import ChannelNorm
from repsep_model.separation import LocalSeparation, RegionSeparation, own_and_rival


def brute_centres(f_BDhw: Tensor, coarse_BKhw: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.zeros(2, *f_BDhw.shape)
    for f_Dhw, coarse_Khw, own_Dhw, rival_Dhw in zip(f_BDhw, coarse_BKhw, *both, strict=True):
        f_DN, p_KN = f_Dhw.flatten(1), coarse_Khw.softmax(dim=0).flatten(1)
        K, N = p_KN.shape
        centres = [sum((p_KN[k, n] * f_DN[:, n] for n in range(N)), torch.zeros(1)) / p_KN[k].sum() for k in range(K)]
        for n in range(N):
            doubt = [float(p_KN[k, n] * (1 - p_KN[k, n])) for k in range(K)]
            for k in range(K):
                own_Dhw.flatten(1)[:, n] += float(p_KN[k, n]) * centres[k]
                rival_Dhw.flatten(1)[:, n] += doubt[k] / sum(doubt) * centres[k]
    return both[0], both[1]


def test_local_separation_is_the_identity_before_its_norm_at_the_start() -> None:
    torch.manual_seed(0)
    module = LocalSeparation(8, 8)
    module.norm = nn.Identity()  # type: ignore[assignment]
    f, context = torch.randn(2, 8, 5, 6), torch.randn(2, 16, 5, 6)
    torch.testing.assert_close(module(f, context, None), f, rtol=0, atol=0)


def test_smoothing_equals_each_locations_own_softmax_kernel() -> None:
    torch.manual_seed(0)
    module = LocalSeparation(8, 0, size=3, groups=2)
    f = torch.randn(2, 8, 4, 5)
    with torch.no_grad():
        assert module.kernel is not None
        weights = module.kernel(f).view(2, 2, 9, 4, 5).softmax(dim=2)
        out = module.smooth(f)
    for y in range(4):
        for x in range(5):
            for d in range(8):
                mean = torch.zeros(2)
                for i in range(9):
                    row, column = min(max(y + i // 3 - 1, 0), 3), min(max(x + i % 3 - 1, 0), 4)
                    mean += weights[:, d // 4, i, y, x] * f[:, d, row, column]
                torch.testing.assert_close(out[:, d, y, x], mean)


def test_local_separation_moves_away_from_the_smoothed_map_by_alpha_and_lambda() -> None:
    torch.manual_seed(0)
    module = LocalSeparation(8, 0)
    module.norm = nn.Identity()  # type: ignore[assignment]
    f = torch.randn(1, 8, 5, 6)
    with torch.no_grad():
        module.lambda_.normal_()
        module.rho.normal_()
        alpha = 2 * torch.sigmoid(module.alpha(f))
        expected = f + alpha * module.lambda_ * (f - module.smooth(f)) + module.rho * (f - f.mean((2, 3), keepdim=True))
        torch.testing.assert_close(module(f, f, None), expected)


def test_own_and_rival_equal_brute_force() -> None:
    torch.manual_seed(0)
    f, coarse = torch.randn(2, 3, 3, 4), 2 * torch.randn(2, 4, 3, 4)
    torch.testing.assert_close(own_and_rival(f, coarse), brute_centres(f, coarse))


def test_own_and_rival_are_the_same_where_nothing_is_known() -> None:
    own, rival = own_and_rival(torch.randn(1, 6, 4, 4), torch.zeros(1, 5, 4, 4))
    torch.testing.assert_close(own, rival)


def test_a_location_between_two_classes_is_nearer_to_the_likelier_and_its_rival_leans_to_the_other() -> None:
    f = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]]])  # classes 0 and 1 lie on the two axes
    coarse = torch.zeros(1, 3, 1, 4)
    coarse[:, 0, :, :2] = coarse[:, 1, :, 2:] = 8
    coarse[:, 2] = -8
    coarse[0, :, 0, 0] = torch.tensor([2.0, 1.0, -8.0])
    own, rival = (centre[0, :, 0, 0] for centre in own_and_rival(f, coarse))
    assert own[0] - rival[0] > 0.1
    assert own[1] - rival[1] < -0.1


def test_confident_locations_stay_finite_and_have_finite_gradients() -> None:
    f = torch.randn(1, 4, 3, 3, requires_grad=True)
    coarse = torch.full((1, 3, 3, 3), -1e4)
    coarse[:, 1] = 1e4
    coarse.requires_grad_()
    own, rival = own_and_rival(f, coarse)
    (own - rival).sum().backward()
    assert own.isfinite().all()
    assert rival.isfinite().all()
    for leaf in (f, coarse):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_centres_are_computed_in_fp32_under_autocast() -> None:
    f, coarse = torch.randn(1, 4, 8, 8).bfloat16(), torch.randn(1, 3, 8, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = own_and_rival(f, coarse)
    assert inside[0].dtype == inside[1].dtype == torch.float32
    torch.testing.assert_close(inside, own_and_rival(f.float(), coarse.float()), rtol=0, atol=0)


def test_region_separation_adds_what_it_makes_of_the_location_its_own_centre_and_the_rivals() -> None:
    torch.manual_seed(0)
    module = RegionSeparation(8, 8)
    module.norm = nn.Identity()  # type: ignore[assignment]
    f, context, coarse = torch.randn(1, 8, 4, 5), torch.randn(1, 16, 4, 5), torch.randn(1, 3, 4, 5)
    with torch.no_grad():
        alpha = 2 * torch.sigmoid(module.alpha(context))
        own, rival = own_and_rival(f, coarse)
        expected = f + alpha * module.mix(torch.cat([f, own, rival], dim=1))
        torch.testing.assert_close(module(f, context, coarse), expected)


@pytest.mark.parametrize("kind", [LocalSeparation, RegionSeparation])
def test_output_is_normalised_over_channels(kind: type[LocalSeparation] | type[RegionSeparation]) -> None:
    torch.manual_seed(0)
    module = kind(8, 8)
    assert isinstance(module.norm, ChannelNorm)
    out = module(3 + 5 * torch.randn(1, 8, 4, 5), torch.randn(1, 16, 4, 5), torch.randn(1, 3, 4, 5))
    torch.testing.assert_close(out.mean(dim=1), torch.zeros(1, 4, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.var(dim=1, correction=0), torch.ones(1, 4, 5), rtol=1e-3, atol=1e-3)


def test_uniform_control_subtracts_the_plain_mean_and_has_no_kernel() -> None:
    module = LocalSeparation(8, 0, size=3, uniform=True)
    f = torch.randn(1, 8, 4, 5)
    padded = nn.functional.pad(f, [1] * 4, mode="replicate")
    mean = torch.stack([padded[..., y : y + 4, x : x + 5] for y in range(3) for x in range(3)]).mean(dim=0)
    torch.testing.assert_close(module.smooth(f), mean)
    kernel = {"kernel.weight", "kernel.bias"}
    assert set(LocalSeparation(8, 0).state_dict()) - set(module.state_dict()) == kernel
