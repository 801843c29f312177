"""Gradient checkpointing: the same losses and gradients, computed twice instead of kept.

Shapes: B batch, H x W pixels.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repsep_model import LossWeights, Segmentor, segmentation_loss
from repsep_model.backbone import Backbone
from repsep_model.losses import total_loss
from tests.model.tiny import FAMILIES, PVT, VIT, family_segmentor, random_images, random_labels, tiny_segmentor

WEIGHTS = LossWeights()


def gradients(model: Segmentor, *, bf16: bool = False) -> tuple[Tensor, dict[str, Tensor], int]:
    """The loss of a batch, its gradients, and the bytes that were kept for them beside the weights."""
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(random_images(2, 49, 63))
        loss = total_loss(segmentation_loss(output, random_labels(2, 49, 63), WEIGHTS), WEIGHTS)
        at_forward = sum(kept.values())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, at_forward


def assert_same_with_less(model: Segmentor, **how: Any) -> None:
    expected_loss, expected, most = gradients(model, **how)
    model.set_grad_checkpointing()
    loss, found, kept = gradients(model, **how)
    assert loss == expected_loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert kept < 0.8 * most
    model.set_grad_checkpointing(False)
    assert gradients(model, **how)[2] == most


@pytest.mark.parametrize("family", FAMILIES)
def test_each_familys_gradients_are_the_same_and_less_is_kept(family: str) -> None:
    assert_same_with_less(family_segmentor(family).train())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("config", [VIT, PVT], ids=["vit", "pyramid"])
def test_drop_path_and_bf16_are_computed_again_as_they_were(config: Any, bf16: bool) -> None:
    model = tiny_segmentor(config, separation="local", cross_attention=2, drop_path=0.5).train()
    assert_same_with_less(model, bf16=bf16)


def calls(model: nn.Module, parts: dict[str, nn.Module], run: Any) -> dict[str, int]:
    """How often each part's forward ran."""
    counts = dict.fromkeys(parts, 0)

    def count(name: str) -> Any:
        return lambda *_: counts.__setitem__(name, counts[name] + 1)

    handles = [part.register_forward_pre_hook(count(name)) for name, part in parts.items()]
    run(model)
    for handle in handles:
        handle.remove()
    return counts


def parts_of(model: Segmentor) -> dict[str, nn.Module]:
    assert model.local_pathway is not None
    assert model.separation is not None
    assert model.cross_attention is not None
    return {
        "first block": model.backbone.model.blocks[0],
        "last block": model.backbone.model.blocks[-1],
        "local": model.local_pathway.blocks[2],
        "separation": model.separation,
        "cross-attention": model.cross_attention,
    }


def test_backbone_and_our_parts_run_twice_in_training_and_once_in_inference() -> None:
    model = tiny_segmentor().train()
    assert set(calls(model, parts_of(model), gradients).values()) == {1}
    model.set_grad_checkpointing()
    assert set(calls(model, parts_of(model), gradients).values()) == {2}
    ready = model.for_inference()
    assert set(calls(ready, parts_of(ready), lambda m: m(random_images(1, 32, 32))).values()) == {1}


def test_copy_and_weights_are_those_of_any_other_model() -> None:
    model = tiny_segmentor().train()
    names = list(model.state_dict())
    model.set_grad_checkpointing()
    assert list(model.state_dict()) == names
    with torch.no_grad():
        expected = tiny_segmentor().eval()(random_images(1, 32, 32)).logits
        torch.testing.assert_close(copy.deepcopy(model).eval()(random_images(1, 32, 32)).logits, expected)


def test_backbone_that_cannot_is_refused_by_name_and_may_be_left_off() -> None:
    backbone = Backbone("vgg11", args={})
    with pytest.raises(ValueError, match="backbone 'vgg11' has no gradient checkpointing"):
        backbone.set_grad_checkpointing()
    backbone.set_grad_checkpointing(False)
