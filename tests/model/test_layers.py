"""The shared pieces against torch's own functions."""

import torch
import torch.nn.functional as F

from repsep_model.layers import ChannelMlp, ChannelNorm, resize


def test_channel_norm_normalises_each_location_over_its_channels() -> None:
    torch.manual_seed(0)
    norm = ChannelNorm(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 3, 4)
    out = norm(x)
    for i in range(3):
        for j in range(4):
            expected = F.layer_norm(x[:, :, i, j], (6,), norm.weight, norm.bias)
            torch.testing.assert_close(out[:, :, i, j], expected)


def test_channel_mlp_sees_one_location_at_a_time() -> None:
    torch.manual_seed(0)
    mlp = ChannelMlp(6)
    x = torch.randn(2, 6, 3, 4)
    changed = x.clone()
    changed[:, :, 1, 2] += 1
    moved = (mlp(x) - mlp(changed)).abs().amax(dim=(0, 1)) > 0
    assert moved.nonzero().tolist() == [[1, 2]]
    assert mlp[0].out_features == 4 * 6


def test_resize_averages_finer_maps() -> None:
    x = torch.randn(1, 2, 8, 12)
    torch.testing.assert_close(resize(x, (4, 6)), F.avg_pool2d(x, 2))


def test_resize_interpolates_coarser_maps_between_pixel_centres() -> None:
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 2, 4)
    expected = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0])
    torch.testing.assert_close(resize(x, (4, 8))[0, 0, 0], expected)


def test_resize_to_the_same_size_copies_nothing() -> None:
    x = torch.randn(1, 2, 3, 4)
    assert resize(x, (3, 4)) is x
