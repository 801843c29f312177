"""Backbone weights of others, taken in with a report of what found its place. Nothing in a foreign file is executed.

    file, or timm's weights by name -> read -> unwrapped -> renamed -> resized -> loaded

Read: safetensors, or a torch pickle of nothing but tensors and plain values. Unwrapped: out of a training checkpoint
(its averaged or teacher weights first) and out of a larger model. Renamed: timm's `checkpoint_filter_fn` of the family
knows the official names; what it leaves to do for BEiT and DINOv2 is here. Resized, in fp32 whatever the file holds:
patch kernels by the filter, position embeddings and relative position tables here.
Shapes: N positions, those of P prefix tokens (class, distillation) first, then those of h x w patches; C channels.
Credit: timm (Ross Wightman); BEiT (Bao, Dong, Piao, Wei), whose fine-tuning gives each block a copy of the shared
table and stretches it for larger windows.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import math
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from scipy.interpolate import RegularGridInterpolator
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from repsep_model.backbone import Backbone

# Where a checkpoint keeps its weights, in order of preference: an average or a teacher is what its authors evaluate.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "teacher", "target_encoder"),
    *("state_dict", "model", "module", "model_state", "encoder"),
)
# What stands before a weight's name where the backbone is a part of something larger.
PREFIX = re.compile(r"(?:(?:module|_orig_mod|model|backbone|encoder|base_encoder|teacher|student)\.)*")
# What a backbone has no place for, by its part: final norms, heads, decoders, mask tokens, and what is computed.
SPARE = re.compile(
    PREFIX.pattern + r"(?:(norm|fc_norm|mask_token|decoder\w*|\w*head\w*)(?:\.|$)"
    r"|.*\.(relative_position_index|relative_coords_table|attn_mask|periods|bias_mask|num_batches_tracked)$)"
)
TABLE = "relative_position_bias_table"
RESIZABLE = ("pos_embed", "patch_embed.proj.weight", TABLE, "rel_pos_h", "rel_pos_w")

_SCALAR = np.float64(0).__reduce__()[0]
# The settings and scores in training checkpoints; to make one has no effect.
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    *((_SCALAR, f"{package}.multiarray.scalar") for package in ("numpy.core", "numpy._core")),
]


class CheckpointError(ValueError):
    """A directory that holds no whole segmentor, or weights that do not fit; the message says which file and why."""


@dataclass(frozen=True)
class LoadReport:
    """Which weights found their place, by the backbone's names; `unexpected` is what is left of the file."""

    matched: tuple[str, ...]
    resized: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def unexplained(self) -> tuple[str, ...]:
        """What is unexpected and no head, decoder or final norm: a deeper model's blocks, say."""
        return tuple(name for name in self.unexpected if not SPARE.match(name))

    def __str__(self) -> str:
        spare = {name: match[match.lastindex or 0] for name in self.unexpected if (match := SPARE.match(name))}
        counts = (
            f"{len(self.matched)} matched, {len(self.resized)} resized{_listed(self.resized)}, "
            f"{len(self.missing)} missing{_listed(self.missing)}, "
            f"{len(self.unexpected)} unexpected{_listed(self.unexplained)}"
        )
        return counts + (f", of these {len(spare)} by design{_listed(spare.values())}" if spare else "")


def _listed(names: Iterable[str], most: int = 5) -> str:
    different = list(dict.fromkeys(names))
    return f" ({', '.join(different[:most])}{', ...' if len(different) > most else ''})" if different else ""


def load_pretrained(backbone: Backbone, file: Path, *, grid: tuple[int, int] | None = None) -> LoadReport:
    """Weights from a safetensors file or a torch checkpoint: of timm, MAE, BEiT, DINO or what was trained from them.

    `grid` is (h, w) of the file's position embedding; without it a square is assumed wherever the number allows one.
    Raises CheckpointError for a file that cannot be read or holds more than plain data, for one with nothing that fits,
    and for weights of a model of another shape.
    """
    fitted, report = _fit(backbone.model, _unwrapped(_read(file), str(file)), str(file), grid)
    backbone.model.load_state_dict(fitted, strict=False)
    return report


def load_named(backbone: Backbone) -> LoadReport:
    """timm's weights for the backbone's name, downloaded or from timm's cache.

    Raises CheckpointError if there are none, if they cannot be had, or if the backbone's arguments changed its shape.
    """
    model = backbone.model
    name, hub = model.pretrained_cfg["architecture"], model.pretrained_cfg.get("hf_hub_id")
    reports = []

    def fit(weights: dict[str, Tensor], _: Any = None) -> dict[str, Tensor]:
        fitted, report = _fit(model, _unwrapped(weights, name), f"timm's file for {name}", None)
        reports.append(report)
        return fitted

    try:
        timm.models.load_pretrained(model, num_classes=0, filter_fn=fit, strict=False)
    except CheckpointError:
        raise
    except Exception as error:
        advice = (
            f"download https://huggingface.co/{hub} elsewhere and give the file's path as `pretrained`: " if hub else ""
        )
        raise CheckpointError(f"no pretrained weights for backbone {name!r}: {advice}{error}") from error
    return reports[0]


def _read(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own message advises to let the code run.
        if isinstance(error, pickle.UnpicklingError) and (code := re.search(r"GLOBAL (\S+)", str(error))):
            raise CheckpointError(
                f"{file} cannot be read as weights: it would run {code[1]}; have its state dict alone saved, "
                "best as safetensors"
            ) from error
        if file.is_dir():
            raise CheckpointError(f"{file} is a folder; give the file in it, for example model.safetensors") from error
        if isinstance(error, (pickle.UnpicklingError, EOFError)):
            raise CheckpointError(
                f"{file} cannot be read as weights: it is no file that torch wrote, or not all of it; "
                "was it downloaded whole?"
            ) from error
        raise CheckpointError(f"{file} cannot be read as weights: {error}") from error


def _unwrapped(content: Any, source: str) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} holds a {type(content).__name__}, not a state dict")
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            return _unwrapped(content[key], source)
    return {str(name): t.detach() for name, t in content.items() if isinstance(t, Tensor)}


def _fit(
    model: Any, weights: dict[str, Tensor], source: str, grid: tuple[int, ...] | None
) -> tuple[dict[str, Tensor], LoadReport]:
    """The weights that the model has a place for, by its names and in its shapes."""
    own: dict[str, Tensor] = model.state_dict()
    name, first = model.pretrained_cfg["architecture"], list(weights)[:3]
    weights = _official_names(_without_prefix(weights, own), own)
    weights = {n: t.float() if t.is_floating_point() else t for n, t in weights.items()}
    try:
        found = _timm_names(weights, own, model)
    except Exception as error:
        raise CheckpointError(f"{source} does not fit backbone {name!r}: {error!r}") from error
    found, resized = _in_size(found, weights, own, model, source, grid)

    matched = tuple(n for n in own if n in found)
    if not matched:
        raise CheckpointError(f"{source} has no weights for this backbone; its first keys: {first}")
    wrong = [n for n in matched if found[n].shape != own[n].shape]
    if wrong:
        there, here = tuple(found[wrong[0]].shape), tuple(own[wrong[0]].shape)
        raise CheckpointError(
            f"{source} is of a model of another width or shape than backbone {name!r}: {wrong[0]} is {there} there and "
            f"{here} here, {len(wrong) - 1} more differ"
        )
    dropped = (n for n in weights if n not in found and n not in own and SPARE.match(n))
    report = LoadReport(
        matched=matched,
        resized=tuple(n for n in matched if n in resized),
        missing=tuple(n for n in own if n not in found),
        unexpected=(*(n for n in found if n not in own), *dropped),
    )
    return {n: found[n] for n in matched}, report


def _without_prefix(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix before most of the backbone's names; before most of the file's, if those are official ones."""
    prefixes = Counter(match[0] for name in weights if (match := PREFIX.match(name)))
    prefix = max(prefixes, key=lambda p: (sum(p + name in weights for name in own), prefixes[p]), default="")
    others = {name: t for name, t in weights.items() if not name.startswith(prefix)}
    return others | {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def _official_names(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """What timm's filters leave to do in files of DINOv2 and BEiT."""
    renamed = {}
    for name, t in weights.items():
        in_blocks = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)  # trained in chunks: blocks.1.7 is block 7
        renamed[in_blocks if name not in own and in_blocks in own else name] = t
    if "reg_token" in own and "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
    shared = f"rel_pos_bias.{TABLE}"
    if shared in renamed and shared not in own:
        table = renamed.pop(shared)
        renamed = {name: table for name in own if name.endswith(f".attn.{TABLE}")} | renamed
    return renamed


def _timm_names(weights: dict[str, Tensor], own: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    filter_fn = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if filter_fn is None:
        return weights
    held = {n: t for n, t in weights.items() if _held(n, own, model)}
    options = {"adapt_layer_scale": True} | _interpolation(model)
    known = inspect.signature(filter_fn).parameters
    with contextlib.redirect_stdout(sys.stderr):  # DINOv3's prints
        adapted: dict[str, Tensor] = filter_fn(
            {n: t for n, t in weights.items() if n not in held},
            model,
            **{k: v for k, v in options.items() if k in known},
        )
    return adapted | held


def _held(name: str, own: dict[str, Tensor], model: Any) -> bool:
    """Whether a weight is resized here, or is one that timm's filters fail on where the model has no place for it."""
    if name == "pos_embed":
        return _has_positions(own, model) or (name not in own and hasattr(model, name))
    return name.endswith(TABLE)


def _has_positions(own: dict[str, Tensor], model: Any) -> bool:
    """Whether the model has a position embedding (1, N, C) of a known grid."""
    return "pos_embed" in own and own["pos_embed"].ndim == 3 and hasattr(model.patch_embed, "grid_size")


def _in_size(
    found: dict[str, Tensor],
    weights: dict[str, Tensor],
    own: dict[str, Tensor],
    model: Any,
    source: str,
    grid: tuple[int, ...] | None,
) -> tuple[dict[str, Tensor], set[str]]:
    """What was found, with positions and tables resized, and the names of all that was, by timm's filter too."""
    published = {t.untyped_storage().data_ptr() for t in weights.values()}
    resized = {n for n, t in found.items() if n.endswith(RESIZABLE) and t.untyped_storage().data_ptr() not in published}
    fitted = dict(found)
    for name in found:
        if name.endswith(TABLE) and name in own and found[name].shape != own[name].shape:
            window = model.get_submodule(name.removesuffix(f".{TABLE}")).window_size
            fitted[name] = _fitted_table(found[name], len(own[name]), window)
            resized.add(name)
    if "pos_embed" in weights and _has_positions(own, model):  # otherwise timm's filter made and resized it
        tokens, old_grid = _old_grid(found["pos_embed"].shape[1], model, source, grid)
        fitted |= _fitted_positions(found, tokens, old_grid, model)
        if old_grid != _grid(model):
            resized.add("pos_embed")
    return fitted, resized


def _interpolation(model: Any) -> dict[str, Any]:
    """As timm has it for the family."""
    linear = any(family in model.pretrained_cfg["architecture"] for family in ("flexivit", "radio"))
    return {"interpolation": "bilinear" if linear else "bicubic", "antialias": not linear}


def _grid(model: Any) -> tuple[int, ...]:
    return tuple(model.patch_embed.grid_size)


def _old_grid(N: int, model: Any, source: str, grid: tuple[int, ...] | None) -> tuple[int, tuple[int, ...]]:
    """(P, grid) of N positions in a file: a square grid, or else one like the model's."""
    P = model.pos_embed.shape[1] - math.prod(_grid(model))
    most = max(P, 2)
    if grid is None:
        grid = (math.isqrt(N),) * 2
        if N - math.prod(grid) != P and 0 <= N - math.prod(_grid(model)) <= most:
            grid = _grid(model)
    if not 0 <= N - math.prod(grid) <= most:
        raise CheckpointError(
            f"pos_embed of {source} has {N} positions, which are no grid of {grid[0]} x {grid[1]}; build the backbone "
            "for the image size that the file is of (backbone_args: {img_size: [height, width]})"
        )
    return N - math.prod(grid), grid


def _fitted_positions(found: dict[str, Tensor], old_P: int, old_grid: tuple[int, ...], model: Any) -> dict[str, Tensor]:
    """pos_embed for the model's grid and prefix tokens; a prefix token that had no position gets zeros.

    A class token's position that the model has no place for is added to the token itself, which gives the same sum.
    """
    new_grid = _grid(model)
    P = model.pos_embed.shape[1] - math.prod(new_grid)
    prefix_1PC = found["pos_embed"][:, :old_P]
    patches_1NC = resample_abs_pos_embed(
        found["pos_embed"][:, old_P:],
        new_size=new_grid,
        old_size=old_grid,
        num_prefix_tokens=0,
        **_interpolation(model),
    )
    zeros = prefix_1PC.new_zeros(1, max(P - old_P, 0), prefix_1PC.shape[2])
    fitted = {"pos_embed": torch.cat([prefix_1PC[:, :P], zeros, patches_1NC], dim=1)}
    if old_P > P == 0 and "cls_token" in found:
        fitted["cls_token"] = found["cls_token"] + prefix_1PC[:, :1]
    return fitted


def _fitted_table(table: Tensor, length: int, window: tuple[int, ...]) -> Tensor:
    """Biases of relative positions, (length, heads) or (heads, 2h-1, 2w-1), for the model's h x w window.

    The three entries of a class token come last and stay. The old window is taken for square; a table of another one
    comes back as it is.
    """
    sides = [2 * side - 1 for side in window]
    if table.ndim == 3:
        return _stretched(table.permute(1, 2, 0), sides).permute(2, 0, 1)
    class_token = length - math.prod(sides)
    old = math.isqrt(max(len(table) - class_token, 0))
    if old * old + class_token != len(table):
        return table
    biases = _stretched(table[: old * old].reshape(old, old, -1), sides)
    return torch.cat([biases.flatten(0, 1), table[old * old :]])


def _stretched(biases: Tensor, sides: list[int]) -> Tensor:
    """(2h-1, 2w-1, heads) interpolated: near relative positions hardly move, the far ones make up for the new size.

    Of a smaller window's positions each one keeps its bias.
    """
    places = [_places(old // 2, new // 2) for old, new in zip(biases.shape[:2], sides, strict=True)]
    wanted = [np.clip(np.arange(new) - new // 2, at[0], at[-1]) for new, at in zip(sides, places, strict=True)]
    interpolated = RegularGridInterpolator(places, biases.numpy())(
        np.stack(np.meshgrid(*wanted, indexing="ij"), axis=-1)
    )
    return torch.from_numpy(interpolated).float()


def _places(old: int, new: int) -> Any:
    """Where distances -old..old lie in -new..new: in steps that grow by a constant factor."""
    low, high = 1.0, 1.5
    while new > old and high - low > 1e-6:
        factor = (low + high) / 2
        low, high = (low, factor) if np.sum(factor ** np.arange(old)) > new else (factor, high)
    distances = np.cumsum(low ** np.arange(old))
    return np.concatenate([-distances[::-1], [0], distances])
