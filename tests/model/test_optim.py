"""Parameter groups, the schedule and the moving average."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from repsep_model.optim import Ema, parameter_groups, scheduled_lr, set_lr
from tests.model.tiny import PVT, VIT, tiny_segmentor

SETTINGS = {"lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.5, "head_lr_scale": 10.0}


@pytest.mark.parametrize("separation", ["local", "region"])
@pytest.mark.parametrize("config", [VIT, PVT], ids=["vit", "pyramid"])
def test_every_parameter_is_in_exactly_one_group(config: object, separation: str) -> None:
    model = tiny_segmentor(VIT if config is VIT else PVT, separation=separation)
    found = [id(p) for group in parameter_groups(model, **SETTINGS) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


def rates(separation: str = "region") -> dict[str, tuple[float, float]]:
    """(base rate, weight decay) of each parameter."""
    model = tiny_segmentor(separation=separation)
    groups = parameter_groups(model, **SETTINGS)
    by_id = {id(p): (g["base_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


def test_deeper_layers_learn_faster_and_our_parts_fastest() -> None:
    found = {name: rate for name, (rate, _) in rates().items()}
    order = [
        "backbone.model.patch_embed.proj.weight",
        *(f"backbone.model.blocks.{block}.attn.qkv.weight" for block in range(4)),
    ]
    for shallow, deep in pairwise(order):
        assert found[deep] == pytest.approx(found[shallow] / 0.5)
    assert found[order[-1]] <= 1e-3
    ours = {rate for name, rate in found.items() if not name.startswith("backbone.")}
    assert ours == {1e-3 * 10}


@pytest.mark.parametrize("separation", ["local", "region"])
def test_weight_decay_is_for_matrices_alone(separation: str) -> None:
    decayed = {name for name, (_, decay) in rates(separation).items() if decay > 0}
    undecayed = {name for name, (_, decay) in rates(separation).items() if decay == 0}
    assert {"fuse_norm.weight", "classifier.bias", "cross_attention.tau", "local_pathway.blocks.0.gamma"} <= undecayed
    assert {"backbone.model.cls_token", "backbone.model.pos_embed", "backbone.model.blocks.0.norm1.weight"} <= undecayed
    assert {"backbone.model.blocks.0.mlp.fc1.weight", "classifier.weight", "separation.alpha.weight"} <= decayed
    assert {"local_pathway.blocks.3.mix.weight", "cross_attention.queries", "identity_head.1.weight"} <= decayed
    if separation == "local":
        assert {"separation.lambda_", "separation.rho"} <= undecayed


def test_schedule_warms_up_to_one_and_falls_to_zero() -> None:
    steps = [scheduled_lr(step, total_steps=100, warmup_steps=10) for step in range(101)]
    assert steps[0] == pytest.approx(1 / 11)
    assert steps[9] == pytest.approx(10 / 11)
    assert steps[10] == 1.0
    assert steps[100] == 0.0
    assert 0 < steps[99] < 0.02
    assert all(a < b for a, b in pairwise(steps[:11]))
    assert all(a > b for a, b in pairwise(steps[10:]))


def test_schedule_without_warm_up_starts_at_one_and_halfway_follows_the_power() -> None:
    assert scheduled_lr(0, total_steps=100, warmup_steps=0) == 1.0
    assert scheduled_lr(50, total_steps=100, warmup_steps=0, power=2.0) == pytest.approx(0.25)


def test_schedule_past_its_end_stays_at_zero() -> None:
    assert scheduled_lr(150, total_steps=100, warmup_steps=10) == 0.0
    assert scheduled_lr(10, total_steps=10, warmup_steps=10) == 1.0


def test_set_lr_scales_each_groups_own_base_rate() -> None:
    optimizer = torch.optim.AdamW(parameter_groups(tiny_segmentor(), **SETTINGS))
    set_lr(optimizer, 0.25)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.25 * group["base_lr"])
    set_lr(optimizer, 1.0)
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(1e-2)


def small_model(value: float) -> nn.Module:
    model = nn.BatchNorm1d(2)
    nn.init.constant_(model.weight, value)
    assert isinstance(model.running_mean, torch.Tensor)
    model.running_mean.fill_(value)
    return model


def test_ema_equals_the_formula_and_its_decay_ramps_up() -> None:
    ema, expected = Ema(small_model(0.0), decay=0.5), 0.0
    for step, value in enumerate([1.0, 2.0, -3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0]):
        ema.update(small_model(value), step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert ema.model.get_parameter("weight").tolist() == pytest.approx([expected] * 2)
        assert ema.model.get_buffer("running_mean").tolist() == [value] * 2, "buffers are copied"
    assert (1 + 11) / (10 + 11) > 0.5, "the ramp ends within this test"


def test_ema_of_unchanging_weights_is_those_weights() -> None:
    model = tiny_segmentor()
    ema = Ema(model, decay=0.999)
    for step in range(3):
        ema.update(model, step)
    for average, current in zip(ema.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(average, current, rtol=0, atol=0)


def test_ema_model_is_apart_from_the_model_and_takes_no_gradient() -> None:
    model = small_model(1.0).train()
    ema = Ema(model, decay=0.9)
    nn.init.constant_(model.get_parameter("weight"), 7.0)
    assert ema.model.get_parameter("weight").tolist() == [1.0, 1.0]
    assert not ema.model.training
    assert model.training
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_ema_state_survives_a_round_trip() -> None:
    ema = Ema(small_model(0.0), decay=0.5)
    ema.update(small_model(3.0), 5)
    restored = Ema(small_model(9.0), decay=0.5)
    restored.load_state_dict(ema.state_dict())
    for again in (ema, restored):
        again.update(small_model(-1.0), 6)
    torch.testing.assert_close(restored.state_dict(), ema.state_dict(), rtol=0, atol=0)
