"""The two datasets of the evidence, in memory, and their splits.

search   trained on train without one group, judged on that group: everything that is chosen is chosen here
final    trained on all of train, judged on val: opened once for each arm
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from repsep_model.images import UInt8, decode_image, decode_mask
from repsep_model.transforms import Augmentation, augment, sample_rng

Study = Literal["search", "final"]
DATA = Path(__file__).parents[3] / "shared/data"
HELD_OUT = {"camvid": r"^0006R0_", "nuclei": r"^[0-3]"}
"""Which names of train are held out in the search: of CamVid one of its three sequences, of the nuclei a quarter by
the first digit of their random names."""

FILL = (124, 116, 104)


@dataclass(frozen=True)
class Samples:
    """Images (H, W, 3) and masks (H, W) uint8, by name."""

    names: Sequence[str]
    images: Sequence[UInt8]
    masks: Sequence[UInt8]
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[UInt8, UInt8]]:
        return zip(self.images, self.masks, strict=True)

    def every(self, n: int) -> Samples:
        return Samples(self.names[::n], self.images[::n], self.masks[::n], self.classes)


def read(name: str, study: Study) -> tuple[Samples, Samples]:
    """What is trained on and what judges."""
    if study == "final":
        return _read(name, "train", ""), _read(name, "val", "")
    return _read(name, "train", f"(?!{HELD_OUT[name]})"), _read(name, "train", HELD_OUT[name])


def _read(name: str, split: str, pattern: str) -> Samples:
    folder = DATA / name
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: the evidence needs the data set {name}")
    paths = [p for p in sorted((folder / "images" / split).iterdir()) if re.match(pattern, p.name)]
    images = [decode_image(p.read_bytes()) for p in paths]
    masks = [decode_mask((folder / "masks" / split / f"{p.stem}.png").read_bytes()) for p in paths]
    classes = [c["name"] for c in json.loads((folder / "classes.json").read_text())["classes"]]
    return Samples([p.stem for p in paths], images, masks, classes)


def batch(samples: Samples, step: int, size: int, seed: int, how: Augmentation) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) and labels (B, S, S) of a step: a function of its arguments, alike for every arm."""
    crops = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(samples))
        order = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(len(samples))
        i = int(order[place])
        crops.append(augment(samples.images[i], samples.masks[i], sample_rng(seed, epoch, i), how, FILL))
    images, labels = zip(*crops, strict=True)
    return torch.stack(images), torch.stack(labels)
