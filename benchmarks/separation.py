"""Which of two models is over-smooth, and where do their classes separate? Every map of both, side by side.

    python benchmarks/separation.py --data <folder> --models <directory> <directory> --out separation.png

The folder holds images/val, masks/val and classes.json; the directories are those that `save_segmentor` writes. Without
--models two tiny models are trained first, on images/train and masks/train. The figures are also printed as a table.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from repsep_model import LossWeights, Segmentor, SegmentorConfig, build_segmentor, load_segmentor, separation_report
from repsep_model.diagnostics import MEASURES, MapMeasures, mean_report
from repsep_model.images import UInt8, decode_image, decode_mask
from repsep_model.inference import fill_colour
from repsep_model.optim import Ema, parameter_groups
from repsep_model.training import StepSettings, TrainState, train_step, validate
from repsep_model.transforms import Augmentation, augment, sample_rng

CROP, BATCH, LR, SEED = 160, 8, 1e-3, 0
PANELS = {  # what a measure is called, and how to read it
    "similarity": ("Cosine between locations", "1 = all alike: over-smooth"),
    "centred_similarity": ("The same, mean taken out", "0 = nothing else in common"),
    "effective_rank": ("Effective rank", "directions that locations spread over"),
    "high_frequency": ("High-frequency energy", "share of waves shorter than 4 locations"),
    "distance_ratio": ("Distance within / between classes", "lower = classes more separate"),
    "class_margin": ("Cosine within - between classes", "higher = classes more separate"),
    "edge_contrast": ("Contrast at class edges", "cosine to own - other class; higher = sharper"),
}
STYLES = (("o-", "#d55e00"), ("s-", "#0072b2"))  # colours that the colour-blind tell apart too
GROUPS = {"backbone": ("block", "stage"), "local pathway": ("P",), "fusion": ("F", "embed")}  # names begin so
KEY = """Maps differ in grid: compare A with B at one.
1, 2 ..  blocks or stages of the backbone
P0, ..   stem of the local pathway, its blocks
F, F'    fused map, before and after separation
E        F' as cross-attention embeds it"""

Samples = Sequence[tuple[UInt8, UInt8]]
Rows = Mapping[str, MapMeasures]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images, masks and classes.json")
    parser.add_argument("--models", type=Path, nargs=2, metavar="DIRECTORY", help="two saved segmentors")
    parser.add_argument("--steps", type=int, default=300, help="of training each tiny model, without --models")
    parser.add_argument("--every", type=int, default=1, help="measure one in so many validation images")
    parser.add_argument("--out", type=Path, default=Path("separation.png"))
    args = parser.parse_args(argv)
    if args.models:
        first, second = args.models
        models = {f"A: {first.name}": load_segmentor(first), f"B: {second.name}": load_segmentor(second)}
    else:
        classes = len(json.loads((args.data / "classes.json").read_text())["classes"])
        whole = SegmentorConfig(backbone="vit_tiny_patch16_224", backbone_args={"depth": 4}, num_classes=classes)
        head = replace(whole, local_pathway=False, separation="none", cross_attention=0)
        configs = {"A: backbone + linear head": head, "B: the whole model": whole}
        models = {name: train_small(config, read(args.data, "train"), args.steps) for name, config in configs.items()}
    samples = read(args.data, "val", args.every)
    tensors = [(torch.from_numpy(i).permute(2, 0, 1)[None], torch.from_numpy(m)[None]) for i, m in samples]
    found = {}
    for name, model in models.items():
        miou = validate(model, samples, bf16=False).scores().miou
        found[f"{name} (mIoU {miou:.3f})"] = mean_report([separation_report(model, *one) for one in tensors]).maps
    figure(found, f"Means over {len(samples)} validation images.").savefig(args.out, dpi=120)
    print(table(found))


def read(data: Path, split: str, every: int = 1) -> Samples:
    """Images (H, W, 3) with their masks (H, W), in the order of their names."""
    paths = sorted((data / "images" / split).iterdir())[::every]
    masks = [data / "masks" / split / f"{path.stem}.png" for path in paths]
    return [(decode_image(i.read_bytes()), decode_mask(m.read_bytes())) for i, m in zip(paths, masks, strict=True)]


def train_small(config: SegmentorConfig, samples: Samples, steps: int) -> Segmentor:
    """Trained from scratch on random crops in this process; the moving average of the weights."""
    torch.manual_seed(SEED)
    model = build_segmentor(config).train()
    groups = parameter_groups(model, lr=LR, weight_decay=0.05, layer_decay=1.0, head_lr_scale=1.0)
    state = TrainState(model, model, torch.optim.AdamW(groups, lr=LR), Ema(model, 0.99))
    settings = StepSettings(LossWeights(), steps, warmup_steps=steps // 10, clip=1.0, bf16=True, seed=SEED)
    how, fill = Augmentation(crop=CROP), fill_colour(model)
    for step in range(steps):
        rngs = [sample_rng(SEED, step, slot) for slot in range(BATCH)]
        crops = [augment(*samples[int(rng.integers(len(samples)))], rng, how, fill) for rng in rngs]
        images, labels = zip(*crops, strict=True)
        train_step(state, [(torch.stack(images), torch.stack(labels))], settings)
    assert isinstance(state.ema.model, Segmentor)
    return state.ema.model


def table(found: Mapping[str, Rows]) -> str:
    """A line for each map, a column for each measure, the models' values beside each other."""
    lines = [" | ".join(found), "map".ljust(10) + "".join(measure.rjust(20) for measure in MEASURES)]
    for name in merged(*found.values()):
        values = [[getattr(rows.get(name), measure, math.nan) for rows in found.values()] for measure in MEASURES]
        cells = [" | ".join("-" if math.isnan(value) else f"{value:.3f}" for value in pair) for pair in values]
        lines.append(name.ljust(10) + "".join(cell.rjust(20) for cell in cells))
    return "\n".join(lines)


def figure(found: Mapping[str, Rows], title: str) -> Figure:
    """A panel for each measure: maps in forward order from left to right, a line for each model."""
    groups = [[name for name in merged(*found.values()) if name.startswith(starts)] for starts in GROUPS.values()]
    # A gap between groups: the local pathway begins at the image, it does not go on from the last block.
    names = [name for group in groups for name in ([*group, ""] if group else [])]
    places = {name: place for place, name in enumerate(names) if name}
    labels = ["E" if name == "embed" else name.removeprefix("block ").removeprefix("stage ") for name in places]
    drawn = Figure(figsize=(18, 9), layout="constrained")
    axes = drawn.subplots(2, 4).flatten()
    for axis, (measure, (heading, reading)) in zip(axes, PANELS.items(), strict=False):
        axis.set_title(f"\n{heading}\n", fontsize=13, fontweight="bold", loc="left")
        axis.text(0, 1.02, reading, transform=axis.transAxes, fontsize=11, color="0.35")
        axis.set_xticks(list(places.values()), labels, fontsize=10 if len(labels) < 20 else 6)
        axis.grid(axis="y", color="0.9")
        for label, group in zip(GROUPS, groups, strict=True):
            for (model, rows), (style, colour) in zip(found.items(), STYLES, strict=True):
                values = [getattr(rows.get(name), measure, math.nan) for name in group]
                axis.plot([places[name] for name in group], values, style, color=colour, label=model)
            if group:
                left, right = places[group[0]], places[group[-1]]
                axis.axvspan(left - 0.6, right + 0.6, color="0.96", zorder=0)
                axis.text((left + right) / 2, -0.13, label, transform=axis.get_xaxis_transform(), ha="center")
    axes[-1].axis("off")
    axes[-1].legend(handles=axes[0].get_lines()[:2], loc="upper left", fontsize=12, frameon=False)
    axes[-1].text(0, 0.75, f"{title}\n{KEY}", va="top", fontsize=11, linespacing=1.6, family="monospace")
    return drawn


def merged(first: Rows, second: Rows) -> list[str]:
    """The names of both, in forward order."""
    longer, other = sorted((list(first), list(second)), key=len, reverse=True)
    for before, name in zip(["", *other], other, strict=False):
        if name not in longer:
            longer.insert(longer.index(before) + 1 if before else 0, name)
    return longer


if __name__ == "__main__":
    main()
