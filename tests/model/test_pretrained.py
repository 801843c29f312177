"""Weights of others find their place whatever file they come in; what does not fit is said, and no code of theirs runs.

The files are written here in the shape in which each project publishes them.
Shapes: N positions, h x w grid, C channels.
"""

import argparse
import logging
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

from repsep_model import build_segmentor
from repsep_model.backbone import Backbone
from repsep_model.pretrained import CheckpointError, LoadReport, load_named, load_pretrained
from tests.model.tiny import FAMILIES, VIT

Weights = dict[str, Tensor]

SMALL = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64}
VIT_NAME, BEIT_NAME = "vit_tiny_patch16_224", "beit_base_patch16_224"
TABLE = "relative_position_bias_table"


def published(name: str = VIT_NAME, args: dict[str, Any] = SMALL, **changes: Any) -> Any:
    """A whole timm classifier, none of its weights at a constant that a fresh backbone has as well."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=10, **(args | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for key, buffer in model.state_dict().items():
            if key.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1)
    return model.eval()


def fresh(name: str = VIT_NAME, args: dict[str, Any] = SMALL, **changes: Any) -> Backbone:
    torch.manual_seed(2)
    return Backbone(name, args=args | changes).eval()


def write(content: Any, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return file


def load(backbone: Backbone, content: Any, folder: Path, **options: Any) -> LoadReport:
    return load_pretrained(backbone, write(content, folder / "weights.pth"), **options)


@torch.no_grad()
def assert_same_maps(backbone: Backbone, reference: Any, side: int = 64) -> None:
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(3))
    maps = reference.forward_intermediates(images, indices=backbone.taps, output_fmt="NCHW", intermediates_only=True)
    for found, expected in zip(backbone(images), maps, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("family", FAMILIES)
def test_timm_file_of_every_family_gives_that_models_maps_to_the_bit(family: str, name: str, tmp_path: Path) -> None:
    timm_name, args = FAMILIES[family]
    model, backbone = published(timm_name, args), fresh(timm_name, args)
    report = load_pretrained(backbone, write(model.state_dict(), tmp_path / name))
    assert set(report.matched) == set(backbone.model.state_dict())
    assert report.missing == report.resized == ()
    assert {n.split(".")[0] for n in report.unexpected} <= {"head", "norm", "fc_norm"}
    assert_same_maps(backbone, model, args.get("img_size", model.pretrained_cfg["input_size"][-1]))


# Official files: each function turns a timm model's weights into what the project of that name publishes.


def renamed(weights: Weights, *patterns: tuple[str, str]) -> Weights:
    def name(key: str) -> str:
        for pattern, replacement in patterns:
            key = re.sub(pattern, replacement, key)
        return key

    return {name(key): tensor for key, tensor in weights.items()}


def under(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: tensor for key, tensor in weights.items()}


def mae(weights: Weights) -> Any:
    """A pre-training checkpoint with its decoder and everything that the training needs to go on."""
    encoder = {k: v for k, v in weights.items() if not k.startswith("head.")}
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.zeros(1, 17, 16),
        "decoder_embed.weight": torch.zeros(16, 48),
        "decoder_blocks.0.norm1.weight": torch.zeros(16),
        "decoder_norm.weight": torch.zeros(16),
        "decoder_pred.weight": torch.zeros(768, 16),
    }
    return {
        "model": encoder | decoder,
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 799,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": argparse.Namespace(model="mae_vit_base_patch16", mask_ratio=0.75, output_dir="./out"),
    }


def beit_index(side: int) -> Tensor:
    return torch.arange((side * side + 1) ** 2).reshape(side * side + 1, -1)


def beit_finetuned(weights: Weights) -> Any:
    index = {f"blocks.{n}.attn.relative_position_index": beit_index(4) for n in range(4)}
    return {"model": weights | index, "epoch": 29, "args": argparse.Namespace(model="beit_base_patch16_224")}


def beit_pretrained(weights: Weights) -> Any:
    """One table that all blocks share."""
    shared = weights[f"blocks.0.attn.{TABLE}"]
    extra = {
        "mask_token": torch.zeros(1, 1, 48),
        "lm_head.weight": torch.zeros(8192, 48),
        "norm.weight": torch.ones(48),
        f"rel_pos_bias.{TABLE}": shared,
        "rel_pos_bias.relative_position_index": beit_index(4),
    }
    return {
        "module": {k: v for k, v in weights.items() if not k.startswith(("head", "fc_norm")) and TABLE not in k} | extra
    }


def dinov2(weights: Weights) -> Any:
    bare = {k: v for k, v in weights.items() if not k.startswith("head")}
    return bare | {"mask_token": torch.zeros(1, 48)}


def dinov2_registers(weights: Weights) -> Any:
    """The class token and its position are apart, here in halves so that their sum is exact; timm adds them up."""
    bare = renamed(dinov2(weights), ("^reg_token", "register_tokens"))
    half = bare["cls_token"] / 2
    return bare | {"cls_token": half, "pos_embed": torch.cat([half, bare["pos_embed"]], dim=1)}


def dinov2_teacher(weights: Weights) -> Any:
    """What its own training saves: blocks in chunks of two, a projection head beside them."""
    chunked = {
        re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", k): v for k, v in dinov2(weights).items()
    }
    head = {"dino_head.mlp.0.weight": torch.zeros(4, 48)}
    return {"teacher": {f"backbone.{k}": v for k, v in chunked.items()} | head}


def dinov3(weights: Weights) -> Any:
    bare = {k: v for k, v in weights.items() if not k.startswith("head")}
    extra = {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(4)}
    for n in range(4):
        extra |= {f"blocks.{n}.attn.qkv.{key}": torch.zeros(144) for key in ("bias", "bias_mask")}
    return renamed(bare, (r"gamma_(\d)", r"ls\1.gamma"), ("^reg_token", "storage_tokens")) | extra


def deit3(weights: Weights) -> Any:
    return {"model": renamed(weights, (r"ls(\d)\.gamma", r"gamma_\1"))}


def swin(weights: Weights) -> Any:
    """Downsampling belongs to the stage before; index and mask are saved."""
    down = {
        re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", k): v
        for k, v in weights.items()
    }
    computed = {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.long),
        "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
    }
    return {"model": renamed(down, (r"^head\.fc", "head")) | computed}


def convnext(weights: Weights) -> Any:
    """Its point-wise convolutions are linear layers."""
    bare = renamed(
        weights,
        (r"^stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2"),
        (r"^stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2"),
        (r"^stem\.", "downsample_layers.0."),
        ("conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"head\.norm", "norm"),
        (r"head\.fc", "head"),
    )
    return {"model": {k: v.flatten(1) if "pwconv" in k and v.ndim == 4 else v for k, v in bare.items()}}


def convnext_segmentor(weights: Weights) -> Any:
    """None of its names is timm's, so that only the filter knows them."""
    inner = {f"backbone.{k}": v for k, v in convnext(weights)["model"].items() if not k.startswith(("head", "norm"))}
    heads = {"decode_head.conv_seg.weight": torch.zeros(3, 4, 1, 1), "auxiliary_head.conv_seg.bias": torch.zeros(3)}
    return {"meta": {"CLASSES": ["a", "b"], "epoch": 3}, "state_dict": OrderedDict(heads | inner)}


def clip(weights: Weights) -> Any:
    """Image and text towers in one; the image tower's position embedding has two dimensions."""
    image = renamed(
        {k: v for k, v in weights.items() if not k.startswith("head")},
        (r"^patch_embed\.proj", "conv1"),
        (r"^pos_embed", "positional_embedding"),
        (r"^cls_token", "class_embedding"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"^blocks", "transformer.resblocks"),
        (r"\.norm", ".ln_"),
        (r"qkv\.", "in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    )
    image |= {
        "positional_embedding": image["positional_embedding"][0],
        "class_embedding": image["class_embedding"].flatten(),
    }
    return under("visual.", image) | {"transformer.resblocks.0.ln_1.weight": torch.ones(4)}


CONVNEXT = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}
OFFICIAL: dict[str, tuple[str, dict[str, Any], Callable[[Weights], Any], int]] = {
    "MAE": (VIT_NAME, SMALL, mae, 64),
    "DeiT3": ("deit3_small_patch16_224", SMALL, deit3, 64),
    "BEiT fine-tuned": (BEIT_NAME, SMALL, beit_finetuned, 64),
    "BEiT pre-trained": (BEIT_NAME, SMALL, beit_pretrained, 64),
    "DINOv2": ("vit_small_patch14_dinov2", SMALL | {"img_size": 56}, dinov2, 56),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 56}, dinov2_registers, 56),
    "DINOv2 teacher": ("vit_small_patch14_dinov2", SMALL | {"img_size": 56}, dinov2_teacher, 56),
    "DINOv3": ("vit_small_patch16_dinov3", SMALL, dinov3, 64),
    "Swin": (*FAMILIES["Swin"], swin, 224),
    "CLIP": ("vit_base_patch16_clip_224", SMALL, clip, 64),
    "ConvNeXt": ("convnext_atto", CONVNEXT, convnext, 64),
    "ConvNeXt in a segmentor": ("convnext_atto", CONVNEXT, convnext_segmentor, 64),
}


@pytest.mark.parametrize("project", OFFICIAL)
def test_official_file_gives_the_maps_of_the_model_in_it_to_the_bit(
    project: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, args, official, side = OFFICIAL[project]
    model, backbone = published(name, args), fresh(name, args)
    if project == "BEiT pre-trained":
        for block in model.blocks:
            block.attn.relative_position_bias_table = model.blocks[0].attn.relative_position_bias_table
    report = load(backbone, official(model.state_dict()), tmp_path)
    assert set(report.matched) == set(backbone.model.state_dict())
    assert report.missing == report.resized == ()
    assert_same_maps(backbone, model, side)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("project", "parts"),
    [
        (
            "MAE",
            {
                "norm",
                "mask_token",
                "decoder_pos_embed",
                "decoder_embed",
                "decoder_blocks",
                "decoder_norm",
                "decoder_pred",
            },
        ),
        ("BEiT fine-tuned", {"fc_norm", "head", "relative_position_index"}),
        ("BEiT pre-trained", {"norm", "lm_head", "mask_token", "relative_position_index"}),
        ("DINOv2 teacher", {"norm", "mask_token", "dino_head"}),
        ("Swin", {"norm", "head", "relative_position_index", "attn_mask"}),
        ("ConvNeXt in a segmentor", {"decode_head", "auxiliary_head"}),
    ],
)
def test_heads_decoders_and_computed_buffers_are_left_over_by_design(
    project: str, parts: set[str], tmp_path: Path
) -> None:
    name, args, official, _ = OFFICIAL[project]
    report = load(fresh(name, args), official(published(name, args).state_dict()), tmp_path)
    found = {part for n in report.unexpected for part in parts if re.search(rf"(^|\.){part}(\.|$)", n)}
    assert found == parts
    assert f"{len(report.unexpected)} unexpected, of these {len(report.unexpected)} by design" in str(report)


# Wrappers


def wrong(weights: Weights) -> Weights:
    return {key: torch.zeros_like(tensor) for key, tensor in weights.items()}


WRAPPED: dict[str, Callable[[Weights], Any]] = {
    "timm training": lambda w: {"state_dict": wrong(w), "state_dict_ema": w, "arch": "vit", "epoch": 3, "version": 2},
    "timm training, no EMA": lambda w: {"state_dict": w, "state_dict_ema": None},
    "DeiT training": lambda w: {"model": wrong(w), "model_ema": w, "lr_scheduler": {"last_epoch": 3}},
    "compiled and distributed": lambda w: {"state_dict": under("_orig_mod.module.", w)},
    "self-distillation": lambda w: {
        "student": under("module.backbone.", wrong(w)),
        "teacher": under("backbone.", w) | {"head.last_layer.weight": torch.zeros(3)},
    },
    "momentum encoder": lambda w: {
        "state_dict": under("module.base_encoder.", w) | under("module.momentum_encoder.", wrong(w))
    },
    "segmentor": lambda w: {
        "meta": {"epoch": 3, "time": "now"},
        "state_dict": OrderedDict(under("backbone.", w) | {"decode_head.conv_seg.weight": torch.zeros(3, 4, 1, 1)}),
    },
    "encoder of a segmentor": lambda w: {"model": under("model.encoder.", w) | under("model.decoder.", wrong(w))},
    "parameters": lambda w: {key: nn.Parameter(tensor) for key, tensor in w.items()},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_backbone_is_found_inside_what_it_was_trained_in(kind: str, tmp_path: Path) -> None:
    model, backbone = published(), fresh()
    report = load(backbone, WRAPPED[kind](model.state_dict()), tmp_path)
    assert set(report.matched) == set(backbone.model.state_dict())
    assert report.missing == ()
    assert_same_maps(backbone, model)


# Position embeddings


def pillow_resized(table_hwC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bicubic with antialias as Pillow has it, which is where the definition is from; (h, w, C) fp32."""
    channels = [
        np.asarray(Image.fromarray(table_hwC[..., c].numpy()).resize(grid[::-1], Image.Resampling.BICUBIC))
        for c in range(table_hwC.shape[2])
    ]
    return torch.from_numpy(np.stack(channels, axis=2))


def position_map(positions_1NC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Of the patches, (h, w, C)."""
    return positions_1NC[0, -grid[0] * grid[1] :].reshape(*grid, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(96, 96), (32, 32), (64, 96), (48, 176)], ids=str)
def test_positions_are_resized_in_fp32_and_the_class_token_keeps_its_own(
    size: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    backbone, grid = fresh(img_size=size), (size[0] // 16, size[1] // 16)
    weights = {key: tensor.to(dtype) for key, tensor in published().state_dict().items()}
    report = load(backbone, weights, tmp_path)
    assert report.resized == ("pos_embed",)
    assert report.missing == ()
    found, published_map = backbone.model.pos_embed.detach(), position_map(weights["pos_embed"].float(), (4, 4))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 0], weights["pos_embed"][:, 0].float(), rtol=0, atol=0)
    torch.testing.assert_close(position_map(found, grid), pillow_resized(published_map, grid), rtol=0, atol=2e-6)
    assert_same_block(backbone, weights)


def assert_same_block(backbone: Backbone, weights: Weights) -> None:
    key = "blocks.3.attn.qkv.weight"
    torch.testing.assert_close(backbone.model.state_dict()[key], weights[key].float(), rtol=0, atol=0)


def test_fp16_file_of_the_same_size_is_taken_as_it_is(tmp_path: Path) -> None:
    backbone = fresh()
    weights = {key: tensor.half() for key, tensor in published().state_dict().items()}
    assert load(backbone, weights, tmp_path).resized == ()
    for key, tensor in backbone.model.state_dict().items():
        torch.testing.assert_close(tensor, weights[key].float(), rtol=0, atol=0)


def test_position_of_the_class_token_is_added_to_it_where_the_model_has_no_place_for_one(tmp_path: Path) -> None:
    model, backbone = published(), fresh(no_embed_class=True)
    report = load(backbone, model.state_dict(), tmp_path)
    assert report.missing == report.resized == ()
    assert_same_maps(backbone, model)


def test_class_token_without_a_position_gets_one_of_zeros(tmp_path: Path) -> None:
    model, backbone = published(no_embed_class=True), fresh()
    report = load(backbone, model.state_dict(), tmp_path)
    assert report.missing == report.resized == ()
    assert_same_maps(backbone, model)


NO_CLASS = {"class_token": False, "global_pool": "avg"}


def test_class_token_that_only_the_file_has_is_left_over(tmp_path: Path) -> None:
    weights, backbone = published().state_dict(), fresh(**NO_CLASS)
    report = load(backbone, weights, tmp_path)
    assert report.missing == report.resized == ()
    assert "cls_token" in report.unexpected
    torch.testing.assert_close(backbone.model.pos_embed.detach(), weights["pos_embed"][:, 1:], rtol=0, atol=0)


def test_class_token_that_only_the_backbone_has_is_missing(tmp_path: Path) -> None:
    weights, backbone = published(**NO_CLASS).state_dict(), fresh()
    report = load(backbone, weights, tmp_path)
    assert report.missing == ("cls_token",)
    torch.testing.assert_close(backbone.model.pos_embed[:, 1:].detach(), weights["pos_embed"], rtol=0, atol=0)


def test_distillation_token_and_its_position_are_left_out(tmp_path: Path) -> None:
    weights, backbone = published("deit_tiny_distilled_patch16_224").state_dict(), fresh(img_size=(64, 96))
    report = load(backbone, weights, tmp_path)
    assert report.missing == ()
    assert "dist_token" in report.unexpected
    found = backbone.model.pos_embed.detach()
    torch.testing.assert_close(found[:, 0], weights["pos_embed"][:, 0], rtol=0, atol=0)
    expected = pillow_resized(position_map(weights["pos_embed"], (4, 4)), (4, 6))
    torch.testing.assert_close(position_map(found, (4, 6)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("changes", [{}, {"no_embed_class": True}], ids=["class position", "none"])
def test_file_of_the_same_non_square_size_is_not_resized(changes: dict[str, Any], tmp_path: Path) -> None:
    """10 x 12 patches and a class token are 121 positions: 11 x 11 without one."""
    model, backbone = published(img_size=(160, 192), **changes), fresh(img_size=(160, 192))
    assert load(backbone, model.state_dict(), tmp_path).resized == ()
    expected = position_map(model.pos_embed.detach(), (10, 12))
    torch.testing.assert_close(position_map(backbone.model.pos_embed.detach(), (10, 12)), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "official", "side"), [(VIT_NAME, mae, 64), ("vit_base_patch16_clip_224", clip, 224)], ids=["MAE", "CLIP"]
)
def test_square_file_for_as_many_patches_in_another_grid_is_resized_once(
    name: str, official: Callable[[Weights], Any], side: int, tmp_path: Path
) -> None:
    weights, backbone = published(name, img_size=side).state_dict(), fresh(name, img_size=(side // 2, side * 2))
    assert load(backbone, official(weights), tmp_path).resized == ("pos_embed",)
    old, new = (side // 16, side // 16), (side // 32, side // 8)
    expected = pillow_resized(position_map(weights["pos_embed"], old), new)
    torch.testing.assert_close(position_map(backbone.model.pos_embed.detach(), new), expected, rtol=0, atol=2e-6)


def test_non_square_file_is_resized_from_the_grid_that_is_given(tmp_path: Path) -> None:
    weights, backbone = published(img_size=(64, 80)).state_dict(), fresh()
    assert load(backbone, weights, tmp_path, grid=(4, 5)).resized == ("pos_embed",)
    expected = pillow_resized(position_map(weights["pos_embed"], (4, 5)), (4, 4))
    torch.testing.assert_close(position_map(backbone.model.pos_embed.detach(), (4, 4)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"grid": (2, 5)}, {"grid": (5, 5)}], ids=str)
def test_positions_of_no_known_grid_are_refused_with_advice(options: dict[str, Any], tmp_path: Path) -> None:
    weights = published(img_size=(64, 80)).state_dict()
    with pytest.raises(
        CheckpointError, match=r"has 21 positions, which are no grid of \d x 5|4; build the backbone for"
    ):
        load(fresh(), weights, tmp_path, **options)


def test_positions_for_a_backbone_without_any_are_left_over(tmp_path: Path) -> None:
    weights = published(BEIT_NAME).state_dict() | {"pos_embed": torch.zeros(1, 17, 48)}
    report = load(fresh(BEIT_NAME), weights, tmp_path)
    assert report.missing == ()
    assert "pos_embed" in report.unexpected


# Relative positions and patches


def table_map(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Biases by relative position, (2h-1, 2w-1, heads), without those of a class token."""
    rows, columns = 2 * window[0] - 1, 2 * window[1] - 1
    return table[: rows * columns].reshape(rows, columns, -1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch, of how timm indexes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("official", [beit_finetuned, beit_pretrained])
def test_table_for_a_larger_window_is_stretched_in_fp32_in_every_block(
    official: Callable[[Weights], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = {key: nn.Parameter(tensor.to(dtype)) for key, tensor in published(BEIT_NAME).state_dict().items()}
    backbone = fresh(BEIT_NAME, img_size=96)
    report = load(backbone, official(weights), tmp_path)
    assert set(report.resized) == {f"blocks.{n}.attn.{TABLE}" for n in range(4)}
    assert report.missing == ()
    for n in range(4):
        table = weights[f"blocks.{n if official is beit_finetuned else 0}.attn.{TABLE}"].detach().float()
        found = backbone.model.blocks[n].attn.relative_position_bias_table.detach()
        expected = resize_rel_pos_bias_table(table, (6, 6), (11 * 11 + 3, 3))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[-3:], table[-3:], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "args", "window", "key"),
    [
        (*FAMILIES["Swin"], {"window_size": 4, "img_size": 128}, f"layers.0.blocks.0.attn.{TABLE}"),
        (BEIT_NAME, SMALL | {"img_size": 112}, {"img_size": 64}, f"blocks.0.attn.{TABLE}"),
    ],
    ids=["Swin", "BEiT"],
)
def test_smaller_window_keeps_the_bias_of_every_relative_position(
    name: str, args: dict[str, Any], window: dict[str, int], key: str, tmp_path: Path
) -> None:
    weights, backbone = published(name, args).state_dict(), fresh(name, args | window)
    report = load(backbone, weights, tmp_path)
    assert report.missing == ()
    assert key in report.resized
    found = table_map(backbone.model.state_dict()[key], (4, 4))
    torch.testing.assert_close(found, table_map(weights[key], (7, 7))[3:-3, 3:-3], rtol=0, atol=0)


def test_table_of_maxvit_in_its_own_layout_is_stretched(tmp_path: Path) -> None:
    name, args = FAMILIES["MaxViT"]
    weights, backbone = published(name, args).state_dict(), fresh(name, args, img_size=256)
    report = load(backbone, weights, tmp_path)
    assert report.missing == ()
    key = next(n for n in report.resized if n.endswith(TABLE))
    assert weights[key].shape[1:] == (13, 13)
    found = backbone.model.state_dict()[key]
    assert found.shape[1:] == (15, 15)
    torch.testing.assert_close(found[:, 6:9, 6:9], weights[key][:, 5:8, 5:8], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, ::14, ::14], weights[key][:, ::12, ::12], rtol=0, atol=1e-4)


def test_larger_patch_kernel_answers_an_enlarged_patch_as_the_published_one_did_the_patch(tmp_path: Path) -> None:
    weights, backbone = published(patch_size=8, img_size=32).state_dict(), fresh()
    report = load(backbone, weights, tmp_path)
    assert report.resized == ("patch_embed.proj.weight",)
    patches = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    enlarged = F.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)
    expected = F.conv2d(patches, weights["patch_embed.proj.weight"])
    found = F.conv2d(enlarged, backbone.model.patch_embed.proj.weight.detach())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# What does not fit


@pytest.mark.parametrize(
    ("name", "args", "changes", "sizes"),
    [
        (VIT_NAME, SMALL, {"embed_dim": 96}, r"cls_token is \(1, 1, 96\) there and \(1, 1, 48\) here, 5\d more differ"),
        (VIT_NAME, SMALL, {"embed_dim": 96, "img_size": 96}, r"cls_token is \(1, 1, 96\) there"),
        (VIT_NAME, SMALL, {"mlp_ratio": 2}, r"fc1.weight is \(96, 48\) there and \(192, 48\) here, 11 more differ"),
        (*FAMILIES["Swin"], {"window_size": (2, 3)}, rf"{TABLE} is \(15, 1\) there and \(169, 1\) here, 4 more differ"),
        (BEIT_NAME, SMALL, {"num_heads": 6}, rf"{TABLE} is \(52, 6\) there and \(52, 3\) here, 3 more differ"),
        ("convnext_atto", CONVNEXT, {"dims": (8, 16, 24, 48)}, r"is \(48, 24, 2, 2\) there and \(32, 24, 2, 2\) here"),
    ],
    ids=["width", "width and image size", "MLP ratio", "non-square window", "heads", "pyramid"],
)
def test_weights_of_a_model_of_another_shape_are_refused_and_none_is_taken(
    name: str, args: dict[str, Any], changes: dict[str, Any], sizes: str, tmp_path: Path
) -> None:
    backbone = fresh(name, args)
    before = {key: tensor.clone() for key, tensor in backbone.model.state_dict().items()}
    message = rf"weights.pth is of a model of another width or shape than backbone '{name}': .*{sizes}"
    with pytest.raises(CheckpointError, match=message):
        load(backbone, published(name, args | changes).state_dict(), tmp_path)
    for key, tensor in backbone.model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "stem"), [(VIT_NAME, "blocks.3."), (BEIT_NAME, "blocks.3.")])
def test_blocks_that_only_one_side_has_are_missing_or_unexpected(name: str, stem: str, tmp_path: Path) -> None:
    deep, shallow = published(name).state_dict(), published(name, depth=3).state_dict()
    fourth = {key for key in deep if key.startswith(stem)}
    assert set(load(fresh(name), shallow, tmp_path).missing) == fourth
    deeper = published(name, depth=5).state_dict()
    report = load(fresh(name), deeper, tmp_path)
    assert report.missing == ()
    assert {n for n in report.unexpected if n.startswith("blocks.")} == {n for n in deeper if n.startswith("blocks.4.")}


def test_file_that_timms_filter_fails_on_is_refused_by_name(tmp_path: Path) -> None:
    deeper = published("convnext_atto", CONVNEXT, depths=(1, 1, 2, 1)).state_dict()
    with pytest.raises(CheckpointError, match=r"weights.pth does not fit backbone 'convnext_atto': KeyError"):
        load(fresh("convnext_atto", CONVNEXT), convnext(deeper), tmp_path)


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(3)}, {"model": {}}, {}], ids=["other", "empty", "bare"])
def test_file_with_nothing_that_fits_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no weights for this backbone; its first keys: \["):
        load(fresh(), content, tmp_path)


@pytest.mark.parametrize("content", [[torch.zeros(3)], torch.zeros(3)], ids=["a list", "a tensor"])
def test_file_without_names_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds a {type(content).__name__}, not a state dict"):
        load(fresh(), content, tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_file_that_is_absent_or_broken_is_a_checkpoint_error(name: str, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{name} cannot be read as weights"):
            load_pretrained(fresh(), tmp_path / name)
        (tmp_path / name).write_bytes(b"not weights")


@pytest.mark.parametrize("content", [b"", b"<html>no such file</html>", b"version https://git-lfs.github.com/spec/v1"])
def test_file_that_is_no_checkpoint_is_not_answered_with_advice_to_trust_it(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="was it downloaded whole") as caught:
        load_pretrained(fresh(), tmp_path / "weights.pth")
    assert "weights_only" not in str(caught.value)


def test_folder_is_answered_with_the_file_that_may_be_in_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder; give the file in it, for example model.safetensors"):
        load_pretrained(fresh(), tmp_path)


# Nothing of theirs runs


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "hide",
    [
        lambda payload: {"extra": payload},
        lambda payload: {"args": argparse.Namespace(hook=payload)},
        lambda payload: {"meta": {"log": [payload]}},
    ],
    ids=["weight", "namespace", "nested"],
)
def test_file_with_code_in_it_is_refused_and_not_run(
    hide: Callable[[Payload], dict[str, Any]], zipped: bool, tmp_path: Path
) -> None:
    content, file = {"model": published().state_dict()} | hide(Payload(tmp_path / "made")), tmp_path / "weights.pth"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"cannot be read as weights: it would run posix.mkdir; have") as caught:
        load_pretrained(fresh(), file)
    assert "weights_only" not in str(caught.value), "torch's advice to run it"
    assert not (tmp_path / "made").exists()


def test_pickled_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"would run .*; have its state dict alone saved, best as safetensors"):
        load(fresh(), nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"], ids=["numpy 2", "numpy 1"])
def test_settings_and_scores_beside_the_weights_are_no_obstacle(module: bytes, tmp_path: Path) -> None:
    scores = {"best": np.float64(81.5), "last": np.float32(81.4), "steps": np.int64(3), "done": np.bool_(True)}
    content = {"model": published().state_dict(), "args": argparse.Namespace(lr=1e-3, size=(64, 64)), "scores": scores}
    write(content, tmp_path / "saved.pth")
    with zipfile.ZipFile(tmp_path / "saved.pth") as saved, zipfile.ZipFile(tmp_path / "older.pth", "w") as older:
        for name in saved.namelist():
            older.writestr(name, saved.read(name).replace(b"numpy._core", module))
    assert load_pretrained(fresh(), tmp_path / "older.pth").missing == ()


def test_nothing_stays_allowed_after_a_file_was_read(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    load(fresh(), mae(published().state_dict()), tmp_path)
    assert set(torch.serialization.get_safe_globals()) == before
    assert argparse.Namespace not in before


# By timm's name


def named(file: Path, **changes: Any) -> Backbone:
    """A backbone whose weights timm takes from `file`, as it would from its hub."""
    return fresh(pretrained_cfg_overlay={"file": str(file)}, **changes)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_weights_by_name_give_that_models_maps_to_the_bit(name: str, tmp_path: Path) -> None:
    model = published()
    backbone = named(write(model.state_dict(), tmp_path / name))
    report = load_named(backbone)
    assert set(report.matched) == set(backbone.model.state_dict())
    assert report.missing == report.resized == ()
    assert_same_maps(backbone, model)


@pytest.mark.parametrize("changes", [{}, {"img_size": (64, 96)}, {"no_embed_class": True}, {"depth": 6}], ids=str)
def test_weights_by_name_and_from_the_file_are_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    file = write(published().state_dict(), tmp_path / "model.safetensors")
    by_name, from_file = named(file, **changes), fresh(**changes)
    reports = load_named(by_name), load_pretrained(from_file, file)
    assert set(reports[0].missing) == set(reports[1].missing)
    assert reports[0].resized == reports[1].resized
    for key in reports[0].matched:
        torch.testing.assert_close(by_name.model.state_dict()[key], from_file.model.state_dict()[key], rtol=0, atol=0)


def test_weights_by_name_for_another_width_are_refused(tmp_path: Path) -> None:
    file = write(published(embed_dim=96).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"^timm's file for {VIT_NAME} is of a model of another width or shape"):
        load_named(named(file))


def test_without_a_network_the_error_names_the_backbone_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    backbone = fresh(pretrained_cfg_overlay={"hf_hub_id": "nobody/has-this"})
    message = (
        rf"no pretrained weights for backbone '{VIT_NAME}': download https://huggingface.co/nobody/has-this elsewhere "
        "and give the file's path as `pretrained`: "
    )
    with pytest.raises(CheckpointError, match=message):
        load_named(backbone)


def test_name_without_published_weights_is_refused() -> None:
    backbone = fresh("vit_base_patch32_plus_256", img_size=128)
    with pytest.raises(CheckpointError, match="no pretrained weights for backbone 'vit_base_patch32_plus_256'"):
        load_named(backbone)


# What is reported


def test_report_reads_in_one_line_with_counts_and_first_names() -> None:
    report = LoadReport(
        matched=("a", "b"),
        resized=("pos_embed",),
        missing=tuple(f"blocks.{n}.w" for n in range(7)),
        unexpected=("head.weight", "adapter.w", "decoder_blocks.0.w", "decoder_blocks.1.w", "backbone.norm.bias"),
    )
    assert str(report) == (
        "2 matched, 1 resized (pos_embed), "
        "7 missing (blocks.0.w, blocks.1.w, blocks.2.w, blocks.3.w, blocks.4.w, ...), "
        "5 unexpected (adapter.w), of these 4 by design (head, decoder_blocks, norm)"
    )
    assert str(LoadReport(("a",), (), (), ())) == "1 matched, 0 resized, 0 missing, 0 unexpected"


@pytest.mark.parametrize("kind", [str, Path])
def test_build_segmentor_takes_a_file_and_warns_of_nothing_that_is_left_over(
    kind: Callable[[Path], str | Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    weights = published(args=dict(VIT.backbone_args)).state_dict()
    model = build_segmentor(VIT, pretrained=kind(write(mae(weights), tmp_path / "weights.pth")))
    torch.testing.assert_close(model.backbone.model.blocks[2].attn.qkv.weight, weights["blocks.2.attn.qkv.weight"])
    (record,) = [r for r in caplog.records if "matched" in r.getMessage()]
    assert record.levelno == logging.INFO
    assert "by design" in record.getMessage()


def test_build_segmentor_warns_of_what_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = published(args=dict(VIT.backbone_args), depth=3).state_dict()
    build_segmentor(VIT, pretrained=write(weights, tmp_path / "weights.pth"))
    (record,) = [r for r in caplog.records if "matched" in r.getMessage()]
    assert record.levelno == logging.WARNING
    assert "12 missing (blocks.3.norm1.weight, " in record.getMessage()


def test_build_segmentor_warns_of_blocks_that_it_has_no_place_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = published(args=dict(VIT.backbone_args), depth=6).state_dict()
    build_segmentor(VIT, pretrained=write(weights, tmp_path / "weights.pth"))
    (record,) = [r for r in caplog.records if "matched" in r.getMessage()]
    assert record.levelno == logging.WARNING
    assert "unexpected (blocks.4.norm1.weight, " in record.getMessage()


def test_build_segmentor_takes_weights_by_name(tmp_path: Path) -> None:
    weights = published(args=dict(VIT.backbone_args)).state_dict()
    file = write(weights, tmp_path / "model.safetensors")
    args = {**VIT.backbone_args, "pretrained_cfg_overlay": {"file": str(file)}}
    model = build_segmentor(replace(VIT, backbone_args=args), pretrained=True)
    for key, tensor in model.backbone.model.state_dict().items():
        torch.testing.assert_close(tensor, weights[key], rtol=0, atol=0)
