"""The local pathway: its discrepancy term against loops, its shapes, its switches.

Shapes: B batch, D width, h x w grid at stride s.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repsep_model.local_pathway import LocalDiscrepancy, LocalPathway, LocalSeparationBlock


def learned_discrepancy(width: int) -> LocalDiscrepancy:
    torch.manual_seed(0)
    module = LocalDiscrepancy(width)
    torch.nn.init.normal_(module.weights)
    return module


def brute_discrepancy(u_BDhw: Tensor, weights: Tensor) -> Tensor:
    """u minus a softmax-weighted mean of its 3 x 3 neighbourhood, borders repeated."""
    B, D, h, w = u_BDhw.shape
    out = torch.empty_like(u_BDhw)
    for d in range(D):
        share = weights[d].softmax(dim=0).view(3, 3)
        for y in range(h):
            for x in range(w):
                mean = torch.zeros(B)
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        neighbour = u_BDhw[:, d, min(max(y + i, 0), h - 1), min(max(x + j, 0), w - 1)]
                        mean += share[i + 1, j + 1] * neighbour
                out[:, d, y, x] = u_BDhw[:, d, y, x] - mean
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_discrepancy_of_a_constant_map_is_exactly_zero(dtype: torch.dtype) -> None:
    level = torch.tensor([1000.1, -0.3, 7e-5, 3e4]).view(1, 4, 1, 1)
    with torch.no_grad():
        d = learned_discrepancy(4)(level.expand(2, 4, 5, 6).to(dtype))
    assert torch.count_nonzero(d) == 0


def test_discrepancy_equals_brute_force() -> None:
    module = learned_discrepancy(4)
    u = torch.randn(2, 4, 5, 3)
    with torch.no_grad():
        torch.testing.assert_close(module(u), brute_discrepancy(u, module.weights))


def test_discrepancy_starts_as_the_difference_from_the_mean_of_nine() -> None:
    u = torch.randn(1, 3, 6, 7)
    inside = u[..., 1:-1, 1:-1] - F.avg_pool2d(u, 3, stride=1)
    torch.testing.assert_close(LocalDiscrepancy(3)(u)[..., 1:-1, 1:-1], inside)


def test_discrepancy_does_not_see_a_constant_added_to_a_channel() -> None:
    module = learned_discrepancy(3)
    u = torch.randn(2, 3, 5, 5)
    offset = torch.tensor([5.0, -2.0, 0.5]).view(1, 3, 1, 1)
    torch.testing.assert_close(module(u + offset), module(u), rtol=1e-4, atol=1e-5)


def test_gradient_of_the_discrepancy_is_that_of_a_zero_sum_kernel() -> None:
    """The constant that is taken out carries no gradient: none is missing."""
    module = learned_discrepancy(3).double()
    u = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x) - module(x.flip(3)), (u,))
    module(u).square().sum().backward()
    assert u.grad is not None
    torch.testing.assert_close(u.grad.sum(dim=(2, 3)), torch.zeros(1, 3, dtype=torch.float64))


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_pathway_gives_one_location_per_stride_whatever_the_taps_strides(stride: int) -> None:
    pathway = LocalPathway(16, stride, [6, 8, 10, 12])
    taps = [torch.randn(2, c, 64 // r, 96 // r) for c, r in zip([6, 8, 10, 12], [4, 8, 16, 32], strict=True)]
    out = pathway(torch.randn(2, 3, 64, 96), taps)
    assert out.shape == (2, 16, 64 // stride, 96 // stride)


def test_block_with_no_layer_scale_is_the_identity() -> None:
    block = LocalSeparationBlock(8, 6, layer_scale=0.0)
    p = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(block(p, torch.randn(1, 6, 2, 2)), p, rtol=0, atol=0)


def test_block_starts_close_to_the_identity() -> None:
    torch.manual_seed(0)
    block = LocalSeparationBlock(8, 6)
    assert block.gamma.unique().tolist() == pytest.approx([0.1])
    p = torch.randn(1, 8, 4, 4)
    change = (block(p, torch.randn(1, 6, 2, 2)) - p).abs().mean()
    assert 0 < change < 0.2 * p.abs().mean()


@pytest.mark.parametrize("switches", [{}, {"enhance_discrepancy": False}, {"uniform_smoothing": True}])
def test_images_and_every_tap_reach_the_output(switches: dict[str, bool]) -> None:
    pathway = LocalPathway(16, 8, [6, 6, 6, 6], **switches)
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    taps = [torch.randn(1, 6, 2, 2, requires_grad=True) for _ in range(4)]
    pathway(images, taps).square().sum().backward()
    for source in (images, *taps):
        assert source.grad is not None
        assert source.grad.abs().sum() > 0
    assert [n for n, p in pathway.named_parameters() if p.grad is None] == []


def test_control_without_discrepancy_has_the_same_parameters_and_enhances_the_neighbourhoods_mean() -> None:
    torch.manual_seed(0)
    on, off = LocalPathway(16, 8, [6] * 4), LocalPathway(16, 8, [6] * 4, enhance_discrepancy=False)
    off.load_state_dict(on.state_dict())  # strict: names and shapes are the same
    block = off.blocks[0]
    assert isinstance(block, LocalSeparationBlock)
    seen: list[Tensor] = []
    block.gate.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    p, tap = torch.randn(1, 16, 4, 4), torch.randn(1, 6, 4, 4)
    block(p, tap)
    u, d = seen[0].chunk(2, dim=1)
    torch.testing.assert_close(d, u - block.discrepancy(u))
    images, taps = torch.randn(1, 3, 32, 32), [torch.randn(1, 6, 2, 2) for _ in range(4)]
    assert not torch.allclose(on(images, taps), off(images, taps))


def test_uniform_control_lacks_only_the_kernels_and_subtracts_the_mean_of_nine() -> None:
    learned = dict(LocalPathway(16, 8, [6] * 4).named_parameters())
    uniform = dict(LocalPathway(16, 8, [6] * 4, uniform_smoothing=True).named_parameters())
    assert set(learned) - set(uniform) == {f"blocks.{m}.discrepancy.weights" for m in range(4)}
    assert set(uniform) < set(learned)
    u = torch.randn(1, 4, 5, 6)
    padded = F.pad(u, [1] * 4, mode="replicate")
    mean = torch.stack([padded[..., y : y + 5, x : x + 6] for y in range(3) for x in range(3)]).mean(dim=0)
    torch.testing.assert_close(LocalDiscrepancy(4, uniform=True)(u), u - mean)
