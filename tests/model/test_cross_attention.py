"""Discriminative cross-attention against loops over classes and locations.

Shapes: B batch, D width, K classes, h x w grid, N = h * w.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from repsep_model.cross_attention import CrossAttentionLayer, DiscriminativeCrossAttention

D, K = 8, 3


def attention(layers: int = 1) -> DiscriminativeCrossAttention:
    torch.manual_seed(0)
    module = DiscriminativeCrossAttention(D, K, layers)
    for start in (module.queries, module.presence.weight, module.presence.bias):
        torch.nn.init.normal_(start)
    return module


@torch.no_grad()
def test_layer_equals_brute_force() -> None:
    torch.manual_seed(0)
    layer = CrossAttentionLayer(D)
    queries, f = torch.randn(1, K, D), torch.randn(1, D, 2, 3)
    key, value = layer.key_value(f)[0].flatten(1).split(D)
    query = layer.query(layer.query_norm(queries))[0]
    logits = torch.tensor([[float(query[k] @ key[:, n]) / D**0.5 for n in range(6)] for k in range(K)])
    expected = []
    for k in range(K):
        share = [float(logits[:, n].exp()[k] / logits[:, n].exp().sum()) for n in range(6)]
        region = torch.stack([share[n] / sum(share) * value[:, n] for n in range(6)]).sum(dim=0)
        updated = queries[0, k] + region
        expected.append(updated + layer.ffn(updated))
    found, found_logits = layer(queries, f)
    torch.testing.assert_close(found_logits[0], logits)
    torch.testing.assert_close(found[0], torch.stack(expected))


@torch.no_grad()
def test_scores_are_tau_times_the_cosine_of_region_and_location_and_the_presence() -> None:
    module = attention()
    f = torch.randn(2, D, 3, 4)
    queries, _ = module.layers[0](module.queries.expand(2, -1, -1), f)
    found = module.region_norm(queries)
    regions = module.region(found)
    embedded = module.embed(f)
    for b in range(2):
        for k in range(K):
            own = regions[b, k] - sum(regions[b, j] for j in range(K)) / K
            torch.testing.assert_close(module(f).regions_BKD[b, k], own / own.norm())
            for y, x in itertools.product(range(3), range(4)):
                here = embedded[b, :, y, x] - embedded[b].flatten(1).mean(dim=1)
                expected = 4.0 * F.cosine_similarity(own, here, dim=0) + module.presence(found[b, k])[0]
                torch.testing.assert_close(module(f).scores_BKhw[b, k, y, x], expected)


@torch.no_grad()
def test_what_all_locations_share_changes_no_comparison() -> None:
    module = attention()
    module.embed[0] = torch.nn.Identity()
    f = torch.randn(1, D, 3, 4)
    module.layers = torch.nn.ModuleList([Still()])
    torch.testing.assert_close(module(f + 3.0).scores_BKhw, module(f).scores_BKhw, rtol=1e-4, atol=1e-4)


class Still(torch.nn.Module):
    """A layer whose queries have read nothing."""

    def forward(self, queries_BKD: torch.Tensor, f_BDhw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return queries_BKD, torch.zeros(len(f_BDhw), K, f_BDhw[0, 0].numel())


@torch.no_grad()
def test_attention_that_is_returned_is_the_last_layers() -> None:
    module = attention(layers=2)
    f = torch.randn(1, D, 3, 4)
    queries, _ = module.layers[0](module.queries.expand(1, -1, -1), f)
    _, last = module.layers[1](queries, f)
    torch.testing.assert_close(module(f).attention_BKhw.flatten(2), last)


@torch.no_grad()
def test_regions_do_not_depend_on_where_locations_lie() -> None:
    module = attention()
    f = torch.randn(1, D, 3, 4)
    order = torch.randperm(12)
    shuffled = f.flatten(2)[..., order].view(1, D, 3, 4)
    straight, moved = module(f), module(shuffled)
    torch.testing.assert_close(moved.regions_BKD, straight.regions_BKD)
    torch.testing.assert_close(moved.scores_BKhw.flatten(2), straight.scores_BKhw.flatten(2)[..., order])
    torch.testing.assert_close(moved.attention_BKhw.flatten(2), straight.attention_BKhw.flatten(2)[..., order])


@pytest.mark.parametrize("layers", [1, 2])
def test_every_parameter_serves_the_scores(layers: int) -> None:
    module = attention(layers)
    module(torch.randn(1, D, 3, 4)).scores_BKhw.square().sum().backward()
    dead = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("level", [0.0, 1e4])
def test_flat_and_extreme_features_give_finite_scores_and_gradients(level: float) -> None:
    module = attention()
    f = torch.full((1, D, 3, 4), level, requires_grad=True)
    found = module(f)
    found.scores_BKhw.sum().backward()
    assert found.scores_BKhw.isfinite().all()
    assert f.grad is not None
    assert f.grad.isfinite().all()


def test_models_saved_with_a_scalar_tau_load() -> None:
    module = attention()
    module.load_state_dict(module.state_dict() | {"tau": torch.tensor(2.5)})
    assert module.tau.tolist() == [2.5]
