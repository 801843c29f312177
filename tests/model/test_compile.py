"""torch.compile against eager: one graph in training and inference, the same logits, losses and gradients.

`fullgraph=True` makes every graph break an error, in our parts and in timm's. The backends here need no compiler.
Shapes: B batch, K classes, H x W pixels.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

from repsep_model import LossWeights, Segmentor, SegmentorConfig, segmentation_loss
from repsep_model.layers import pad_replicate
from repsep_model.losses import total_loss
from repsep_model.optim import Ema, parameter_groups
from repsep_model.separation import own_and_rival
from repsep_model.training import StepSettings, TrainState, train_step
from tests.model.tiny import FAMILIES, PVT, VIT, K, family_segmentor, random_images, random_labels, tiny_segmentor

SIZE = (49, 63)
WEIGHTS = LossWeights()
PARTS: dict[str, tuple[SegmentorConfig, dict[str, Any]]] = {
    "ViT": (VIT, {}),
    "PVTv2, local separation, no cross-attention": (PVT, {"separation": "local", "cross_attention": 0}),
    "ViT, plain averages, two layers": (
        VIT,
        {"separation": "local", "cross_attention": 2, "uniform_smoothing": True, "stride": 16},
    ),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def gradients(model: nn.Module, run: Callable[[Tensor], Any]) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch and its gradients."""
    model.zero_grad()
    loss = total_loss(segmentation_loss(run(random_images(2, *SIZE)), random_labels(2, *SIZE), WEIGHTS), WEIGHTS)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_trains_as_eager(model: Segmentor, compiled: Callable[[Tensor], Any]) -> None:
    expected_loss, expected = gradients(model, model)
    loss, found = gradients(model, compiled)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert set(found) == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_family_in_training_is_one_graph(family: str) -> None:
    model = family_segmentor(family).train()
    images = random_images(1, *SIZE)
    found, expected = torch.compile(model, fullgraph=True, backend="eager")(images), model(images)
    torch.testing.assert_close(found.logits, expected.logits)
    for name, part in vars(expected.aux).items():
        torch.testing.assert_close(getattr(found.aux, name), part)


@pytest.mark.parametrize(("config", "changes"), PARTS.values(), ids=PARTS)
def test_compiled_training_gives_eagers_loss_and_gradients(config: SegmentorConfig, changes: dict[str, Any]) -> None:
    model = tiny_segmentor(config, drop_path=0.0, **changes).train()
    assert_trains_as_eager(model, torch.compile(model, fullgraph=True, backend="aot_eager"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
@pytest.mark.parametrize(("config", "changes"), PARTS.values(), ids=PARTS)
def test_default_backend_trains_and_infers_as_eager(
    config: SegmentorConfig, changes: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny_segmentor(config, drop_path=0.0, **changes)
    compiled = torch.compile(model, fullgraph=True)
    model.train()
    assert_trains_as_eager(model, compiled)
    model.eval()
    images = random_images(2, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, model(images).logits, rtol=1e-4, atol=1e-5)


def train(backend: str | None, *, grad_checkpointing: bool) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Five steps of a model that is compiled in place, if at all: its reports and its moving average."""
    model = tiny_segmentor(drop_path=0.0).train()
    names = list(model.state_dict())
    model.set_grad_checkpointing(grad_checkpointing)
    if backend is not None:
        model.compile(fullgraph=True, backend=backend)
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.0, layer_decay=0.9, head_lr_scale=1.0)
    state = TrainState(model, model, torch.optim.SGD(groups, lr=1e-3), Ema(model, 0.9))
    settings = StepSettings(WEIGHTS, total_steps=5, warmup_steps=0, clip=1.0, bf16=False, seed=0)
    batches = [(random_images(1, 48, 48, seed=i), random_labels(1, 48, 48, seed=i)) for i in range(2)]
    reports = [train_step(state, batches, settings) for _ in range(5)]
    assert list(model.state_dict()) == names, "a checkpoint of a compiled model is one of the model"
    return reports, state.ema.state_dict()


def assert_steps_as_eager(backend: str, *, grad_checkpointing: bool) -> None:
    expected, average = train(None, grad_checkpointing=False)
    reports, found = train(backend, grad_checkpointing=grad_checkpointing)
    for report, eager in zip(reports, expected, strict=True):
        assert report == pytest.approx(eager, rel=1e-4)
    torch.testing.assert_close(found, average, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_steps_of_a_model_compiled_in_place_are_eagers(grad_checkpointing: bool) -> None:
    assert_steps_as_eager("aot_eager", grad_checkpointing=grad_checkpointing)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_steps_with_the_default_backend_are_eagers(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert_steps_as_eager("inductor", grad_checkpointing=False)


@torch.no_grad()
def test_compiled_model_follows_train_and_eval() -> None:
    model = tiny_segmentor(drop_path=0.0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = random_images(2, *SIZE)
    for training in (True, False, True):
        model.train(training)
        found = compiled(images)
        torch.testing.assert_close(found.logits, model(images).logits)
        assert (found.aux is not None) == training


@torch.no_grad()
def test_sizes_and_batches_that_change_share_one_graph() -> None:
    """Where timm leaves them open; its plain ViT writes the size into a message, so each size is a graph of its own."""
    model = family_segmentor("ConvNeXt").eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    compiled(random_images(4, 70, 81))
    first = counter.frame_count
    for batch, height, width in ((2, 49, 63), (3, 50, 90), (5, 131, 97)):
        images = random_images(batch, height, width)
        torch.testing.assert_close(compiled(images).logits, model(images).logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == first


def test_loss_and_model_are_one_graph_with_every_term_but_those_of_single_classes() -> None:
    """Dice and Lovász read from the labels which classes there are, and so leave the graph."""
    model = tiny_segmentor(drop_path=0.0).train()
    weights = replace(WEIGHTS, ohem=1.0, classes=(1.0, 2.0, 3.0, 4.0, 5.0))
    images, labels = random_images(2, *SIZE), random_labels(2, *SIZE)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        return total_loss(segmentation_loss(model(images), labels, weights), weights)

    found = torch.compile(step, fullgraph=True, backend="eager")(images, labels)
    torch.testing.assert_close(found, step(images, labels))


@pytest.mark.parametrize("bf16", [False, True])
@torch.no_grad()
def test_compiled_model_follows_autocast(bf16: bool) -> None:
    model = tiny_segmentor(VIT).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = random_images(2, *SIZE)
    plain = model(images).logits
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found, expected = compiled(images).logits, model(images).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found, plain, atol=1e-4) is not bf16


def test_separation_stays_in_full_precision_under_compiled_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, 5, 7, generator=generator)
    coarse = torch.randn(2, K, 5, 7, generator=generator)
    compiled = torch.compile(own_and_rival, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(features, coarse)
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found, own_and_rival(features, coarse))


@pytest.mark.parametrize("margin", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_padding_is_the_same_compiled_and_eager(margin: int, layout: torch.memory_format) -> None:
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=layout).requires_grad_()
    expected = F.pad(x, [margin] * 4, mode="replicate")
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for pad in (pad_replicate, torch.compile(pad_replicate, fullgraph=True, backend="aot_eager")):
        found = pad(x, margin)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], expected_gradient)
