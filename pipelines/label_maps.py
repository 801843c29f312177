"""The classes of public data sets: their names in order, and which train id each id in their masks becomes.

Names and ids are the data sets' own. Colours are Cityscapes' own; for the others `distinct_colours` makes them.
Shapes: H x W pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repsep_model.images import ImageError, UInt8
from repsep_model.labels import IGNORE_INDEX

IDS_SHOWN = 8


@dataclass(frozen=True)
class LabelMap:
    """The classes of a data set, as in classes.json but with `source_id`, and the train id of each id in its masks."""

    name: str
    classes: tuple[dict[str, Any], ...]
    train_ids: Mapping[int, int]

    def remap(self, ids: NDArray[np.integer[Any]]) -> UInt8:
        """(H, W) ids of the source -> train ids, by table. Raises ImageError naming the ids that are not its own."""
        unknown = [int(i) for i in np.unique(ids) if int(i) not in self.train_ids]
        if unknown:
            shown = ", ".join(map(str, unknown[:IDS_SHOWN]))
            raise ImageError(f"the mask has ids that {self.name} does not have: {shown}")
        table = np.full(256, IGNORE_INDEX, np.uint8)
        table[list(self.train_ids)] = list(self.train_ids.values())
        return table[ids]


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours that differ by eye, none dark: the first `count` points of a sequence that fills hue x saturation x value
    evenly, so that more classes change no colour. (Martin Roberts' R_3: steps of 1/g, 1/g^2, 1/g^3 with g^4 = g + 1.)
    """
    g = 1.2207440846057596
    hue, saturation, value = (np.arange(1, count + 1) * g**-power % 1 for power in (1, 2, 3))
    points = zip(hue, 0.35 + 0.65 * saturation, 0.4 + 0.6 * value, strict=True)
    colours = (colorsys.hsv_to_rgb(*map(float, point)) for point in points)
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours]


def _label_map(
    name: str,
    names: Sequence[str],
    source_ids: Iterable[int],
    *,
    ignored: Iterable[int] = (),
    colours: Sequence[tuple[int, int, int]] | None = None,
) -> LabelMap:
    """Class i has the i-th name, source id and colour; the ids of `ignored`, and 255, become 255."""
    described = list(zip(names, source_ids, colours or distinct_colours(len(names)), strict=True))
    classes = tuple(
        {"id": i, "source_id": source_id, "name": called, "color": list(colour)}
        for i, (called, source_id, colour) in enumerate(described)
    )
    train_ids = dict.fromkeys((*ignored, IGNORE_INDEX), IGNORE_INDEX)
    train_ids |= {source_id: i for i, (_, source_id, _) in enumerate(described)}
    return LabelMap(name, classes, train_ids)


def _names(text: str) -> list[str]:
    return [" ".join(name.split()) for name in text.split(",")]


# ---------------------------------------------------------------- ADE20K: 150 classes; 0 is "other"

_ADE20K = _names("""
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
    seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
    counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
    countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
    light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
    pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
    food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
    sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
    glass, clock, flag
""")

ADE20K = _label_map("ADE20K", _ADE20K, range(1, 151), ignored=[0])

# ---------------------------------------------------------------- Cityscapes: 19 of 34 ids are trained

_CITYSCAPES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)

# The licence plate's id of -1 is 255 in 8 bits.
CITYSCAPES = _label_map(
    "Cityscapes",
    [name for name, _, _ in _CITYSCAPES],
    [source_id for _, source_id, _ in _CITYSCAPES],
    ignored=range(34),
    colours=[colour for _, _, colour in _CITYSCAPES],
)

# ---------------------------------------------------------------- Pascal Context: 59 classes; 0 is the background

# NOTE the usual converter numbers the classes as the original's 459 labels are ordered, alphabetically. The list that
# is often printed beside such masks (59_labels.txt) has another order: it calls the television a truck.
_PASCAL_CONTEXT = _names("""
    aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat,
    ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse,
    keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep, shelves,
    sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window, wood
""")

PASCAL_CONTEXT = _label_map("Pascal Context", _PASCAL_CONTEXT, range(1, 60), ignored=[0])
PASCAL_CONTEXT_60 = _label_map(
    "Pascal Context", ["background", *_PASCAL_CONTEXT], range(60), colours=[(0, 0, 0), *distinct_colours(59)]
)

# ---------------------------------------------------------------- COCO-Stuff: 171 of 182 ids

# Street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender, hair brush: named, but never drawn.
COCO_WITHOUT_MASKS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
_COCO_STUFF = _names("""
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard,
    carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
    door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit,
    furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain,
    mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river,
    road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
    structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other,
    wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
""")
_COCO_IDS = [i for i in range(1, 183) if i not in COCO_WITHOUT_MASKS]

# The 10K masks count from 1 with 0 unlabelled; the 164K masks hold one less, with 255 unlabelled.
COCO_STUFF_10K = _label_map("COCO-Stuff-10K", _COCO_STUFF, _COCO_IDS, ignored=[0])
COCO_STUFF_164K = _label_map("COCO-Stuff-164K", _COCO_STUFF, [i - 1 for i in _COCO_IDS])
