"""The generated demo data set: street scenes with textures, occlusion and thin objects, deterministic.

With it the whole pipeline runs where no data is at hand, on a small but real problem: seven classes whose
colours overlap on purpose (grey road, building and car; green leaves, van and sign), so that texture and
shape decide; things of many scales that hide each other; and a layout that no prior per position knows.

Lengths are in units, 1/192 of the image's height: pixels, at the default size. The world's x runs along the
horizon from the vanishing point, y down from it. `depth` is how far below the horizon a thing stands: what is
h times as high as the camera is h * depth units tall.

NOTE every draw is Generator.random, uniform or integers on Philox, and arithmetic is kept to what IEEE 754
defines to the last bit: no normal(), exp() or sin(), which differ between processors and could move an edge.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pipelines.errors import UsageError

Bytes = NDArray[np.uint8]
Plane = NDArray[np.float32]  # (H, W); a colour is (3,) or (H, W, 3)
Region = NDArray[np.bool_]
Points = Sequence[tuple[float, float]]
Parts = Sequence[tuple[int, Points]]
Window = tuple[slice, slice]

CLASSES: tuple[dict[str, Any], ...] = (
    {"id": 0, "name": "sky", "color": [70, 130, 180]},
    {"id": 1, "name": "building", "color": [152, 84, 60]},
    {"id": 2, "name": "road", "color": [128, 64, 128]},
    {"id": 3, "name": "vegetation", "color": [107, 142, 35]},
    {"id": 4, "name": "pole", "color": [235, 235, 235]},
    {"id": 5, "name": "vehicle", "color": [20, 40, 160]},
    {"id": 6, "name": "sign", "color": [250, 200, 0]},
)
SKY, BUILDING, ROAD, VEGETATION, POLE, VEHICLE, SIGN = range(7)
IGNORE = 255
VERSION = 1  # of the drawing: raise it with any change that moves a pixel
UNITS = 192  # in an image's height

# The colours that a thing may have: they overlap between classes on purpose.
PAINT: dict[int, tuple[str, ...]] = {
    SKY: ("#6ea0d7", "#96b4d2", "#b9bcc0", "#9696a0", "#d7aa8c", "#5a78aa"),
    BUILDING: ("#7d7c7a", "#5f6064", "#aaa091", "#965f4b", "#78876e", "#8291a5"),
    ROAD: ("#696867", "#7d7b78", "#55575c", "#877d70", "#6e736c"),
    VEGETATION: ("#46692d", "#5a783c", "#325532", "#787337", "#8c6e3c", "#697855"),
    POLE: ("#5f5f62", "#303032", "#5a4030", "#d2d2d0", "#466446"),
    VEHICLE: ("#aa2828", "#cdcdcd", "#2d2d32", "#737578", "#416437", "#3c5aa0", "#be963c"),
    SIGN: ("#be2828", "#2850aa", "#dcb432", "#286e46", "#d7d7d2", "#785537"),
}

CIRCLE = ((1.0, 0.0), (0.87, 0.5), (0.5, 0.87), (0.0, 1.0), (-0.5, 0.87), (-0.87, 0.5),
          (-1.0, 0.0), (-0.87, -0.5), (-0.5, -0.87), (0.0, -1.0), (0.5, -0.87), (0.87, -0.5))  # fmt: skip


def rgb(code: str) -> Plane:
    return np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)], np.float32)


def box(left: float, top: float, right: float, bottom: float) -> Points:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def wheel(x: float, across: float) -> Points:
    return tuple((x + across * u, 0.86 + 0.14 * v) for u, v in CIRCLE)


SIGNS: tuple[Points, ...] = (
    CIRCLE,
    ((0, -1), (0.95, 0.75), (-0.95, 0.75)),
    ((0, 1), (0.95, -0.75), (-0.95, -0.75)),
    ((0, -1), (1, 0), (0, 1), (-1, 0)),
    box(-0.8, -0.8, 0.8, 0.8),
    box(-1.6, -0.7, 1.6, 0.7),
)
# Vehicles in a unit box, y down: (width / height, height in cameras, parts in the order of drawing).
BODY, GLASS, TYRE, LAMP, CHROME = range(1, 6)
VEHICLES: tuple[tuple[float, float, Parts], ...] = (
    (2.6, 0.8, (  # a car from the side
        (BODY, ((0, 0.86), (0, 0.5), (0.14, 0.4), (0.3, 0), (0.7, 0), (0.84, 0.4), (1, 0.5), (1, 0.86))),
        (GLASS, ((0.22, 0.42), (0.33, 0.13), (0.48, 0.12), (0.48, 0.42))),
        (GLASS, ((0.52, 0.42), (0.52, 0.12), (0.67, 0.12), (0.77, 0.42))),
        (LAMP, box(0.0, 0.52, 0.05, 0.6)), (TYRE, wheel(0.21, 0.055)), (TYRE, wheel(0.79, 0.055)))),
    (1.25, 0.8, (  # a car from behind
        (TYRE, box(0.06, 0.7, 0.24, 1.0)), (TYRE, box(0.76, 0.7, 0.94, 1.0)),
        (BODY, ((0, 0.88), (0, 0.5), (0.12, 0.4), (0.24, 0), (0.76, 0), (0.88, 0.4), (1, 0.5), (1, 0.88))),
        (GLASS, ((0.2, 0.4), (0.29, 0.1), (0.71, 0.1), (0.8, 0.4))), (CHROME, box(0.38, 0.62, 0.62, 0.72)),
        (LAMP, box(0.04, 0.5, 0.2, 0.6)), (LAMP, box(0.8, 0.5, 0.96, 0.6)))),
    (2.3, 1.35, (  # a bus from the side: a row of windows, as a building has
        (BODY, box(0.0, 0.0, 1.0, 0.9)), (CHROME, box(0.0, 0.6, 1.0, 0.64)),
        *((GLASS, box(x, 0.16, x + 0.13, 0.44)) for x in (0.05, 0.23, 0.41, 0.59, 0.8)),
        (TYRE, wheel(0.18, 0.06)), (TYRE, wheel(0.8, 0.06)))),
    (0.95, 1.5, (  # a lorry from behind
        (TYRE, box(0.08, 0.8, 0.26, 1)), (TYRE, box(0.74, 0.8, 0.92, 1)), (BODY, box(0, 0, 1, 0.88)),
        (CHROME, box(0.49, 0.04, 0.51, 0.76)), (LAMP, box(0.04, 0.78, 0.16, 0.84)),
        (LAMP, box(0.84, 0.78, 0.96, 0.84)))),
)  # fmt: skip


class Canvas:
    """An image and its mask, painted from back to front, as seen by a camera drawn at random."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng, (self.height, self.width) = rng, size
        self.unit = self.height / UNITS
        self.image: Plane = np.zeros((*size, 3), np.float32)
        self.mask: Bytes = np.full(size, SKY, np.uint8)
        self.whole = slice(0, self.height), slice(0, self.width)
        self.grade = rng.uniform(-0.12, 0.12)  # of the ground; upright things stay upright
        roll = rng.uniform(-0.15, 0.15)  # of the camera; its cosine and sine need no cos() this way
        self.cos, self.sin = 1 / math.sqrt(1 + roll * roll), roll / math.sqrt(1 + roll * roll)
        self.centre = self.width * rng.uniform(0.1, 0.9), self.height * rng.uniform(0.22, 0.66)
        right = (np.arange(self.width) - self.centre[0]) / self.unit
        down = (np.arange(self.height) - self.centre[1])[:, None] / self.unit
        self.x: Plane = (right * self.cos + down * self.sin).astype(np.float32)
        self.y: Plane = (down * self.cos - right * self.sin).astype(np.float32)
        self.octaves = {cell: self._octave(cell) for cell in (1, 2, 5, 12, 40)}

    def _octave(self, cell: int) -> Plane:
        """Smooth noise in -1..1, its features `cell` units wide. Pillow resizes bytes in integers: exact."""
        rows, cols = (max(2, round(n / (cell * self.unit))) for n in (self.height, self.width))
        grid = Image.fromarray(self.rng.integers(0, 256, (rows, cols), dtype=np.uint8))
        grid = grid.resize((self.width, self.height), Image.Resampling.BICUBIC)
        return np.asarray(grid, np.float32) / np.float32(127.5) - 1

    def noise(self, window: Window, *weights: tuple[int, float]) -> Plane:
        """A weighted sum of octaves, each shifted anew, so that no two things share a texture."""
        rows, cols = (span.stop - span.start for span in window)
        total = np.zeros((rows, cols), np.float32)
        for cell, weight in weights:
            top, left = self.rng.integers(self.height - rows + 1), self.rng.integers(self.width - cols + 1)
            total += np.float32(weight) * self.octaves[cell][top : top + rows, left : left + cols]
        return total

    def colour(self, kind: int) -> Plane:
        base = rgb(PAINT[kind][self.rng.integers(len(PAINT[kind]))]) + self.rng.integers(-12, 13, 3)
        return (base * self.rng.uniform(0.8, 1.2)).astype(np.float32)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pixels(self, points: Points) -> list[tuple[float, float]]:
        cos, sin, (left, top) = self.cos * self.unit, self.sin * self.unit, self.centre
        return [(left + x * cos - y * sin, top + x * sin + y * cos) for x, y in points]

    def window(self, points: Points) -> Window:
        """The slices of the pixels around `points`, two to spare. Never empty: no caller needs a guard."""
        spans = []
        for axis, limit in ((1, self.height), (0, self.width)):
            values = [pixel[axis] for pixel in self.pixels(points)]
            low = min(max(math.floor(min(values)) - 2, 0), limit - 1)
            spans.append(slice(low, min(max(math.ceil(max(values)) + 3, low + 1), limit)))
        return spans[0], spans[1]

    def stencil(self, window: Window, parts: Parts) -> Bytes:
        """The number of the last of `parts` that covers a pixel, 0 where none does."""
        rows, cols = window
        drawn = Image.new("L", (cols.stop - cols.start, rows.stop - rows.start))
        draw = ImageDraw.Draw(drawn)
        for number, points in parts:
            draw.polygon([(x - cols.start, y - rows.start) for x, y in self.pixels(points)], fill=number)
        return np.asarray(drawn)

    def paint(self, window: Window, region: Region, colour: Plane, kind: int, ring: float = 0.0) -> None:
        """Lay a thing over what is there; with probability `ring` its rim, one pixel wide, is unlabelled."""
        np.copyto(self.image[window], colour, where=region[..., None])
        self.mask[window][region] = kind
        if self.chance(ring):
            grown = Image.fromarray(region.view(np.uint8)).filter(ImageFilter.MaxFilter(3))
            self.mask[window][(np.asarray(grown) > 0) & ~region] = IGNORE


def lit(colour: Plane, light: NDArray[np.floating[Any]]) -> Plane:
    return colour * light.astype(np.float32, copy=False)[..., None]


def paint_sky(canvas: Canvas) -> None:
    rng, top, low = canvas.rng, canvas.colour(SKY), canvas.colour(SKY)
    sky = top + (low * 0.6 + 80 - top) * np.clip(1 + canvas.y / 150, 0, 1)[..., None]
    clouds = canvas.noise(canvas.whole, (40, 1.0), (12, 0.45), (5, 0.15)) - rng.uniform(-0.2, 0.8)
    canvas.image[:] = sky + (rng.uniform(150, 235) - sky) * (0.8 * np.clip(clouds, 0, 1))[..., None]


def paint_ground(canvas: Canvas, left: float, right: float) -> None:
    """Grass, sometimes with hills behind it, and a road from x = -left * depth to right * depth."""
    rng, window, depth = canvas.rng, canvas.whole, canvas.y - canvas.grade * canvas.x
    hills = canvas.noise(window, (40, 14), (12, 4), (5, 2)) - rng.uniform(-6, 16)
    grass = 1 + canvas.noise(window, (1, 0.22), (2, 0.2), (12, 0.12))
    canvas.paint(window, depth > -1 - np.maximum(hills, 0), lit(canvas.colour(VEGETATION), grass), VEGETATION)

    ahead = np.maximum(depth, 1)
    across = (canvas.x / ahead + left) / (left + right)  # 0 at the road's left edge, 1 at its right
    tracks = np.abs(across * 4 % 1 - 0.5) < 0.12
    grain = canvas.noise(window, (1, 0.13), (2, 0.05), (40, 0.08))
    asphalt = lit(canvas.colour(ROAD), 1 + grain - np.float32(0.1) * tracks)
    lanes = int(rng.integers(2, 5))
    marks = (np.abs((across * lanes + 0.5) % 1 - 0.5) < 0.012 * lanes) & (np.abs(across - 0.5) < 0.4)
    marks &= rng.uniform(120, 300) / ahead % 1 < 0.55  # dashes: 1 / depth is the distance along the road
    if canvas.chance(0.6):
        marks |= np.abs(np.abs(across - 0.5) - 0.46) < 0.01
    asphalt[marks] += np.float32(rng.uniform(40, 110))
    canvas.paint(window, (across > 0) & (across < 1) & (depth > 0), asphalt, ROAD)


def paint_building(canvas: Canvas, x: float, depth: float) -> None:
    rng = canvas.rng
    wide, tall, gable = rng.uniform(22, 110), rng.uniform(20, 150), rng.uniform(-30, 16)
    left, foot = x - wide / 2, canvas.grade * x + depth
    eaves = foot - tall
    top = ((left, eaves), (x, eaves - max(gable, 0)), (left + wide, eaves))
    outline = (*top, (left + wide, foot), (left, foot))
    window = canvas.window(outline)
    u, v = canvas.x[window] - left, canvas.y[window] - eaves
    bay, storey, (gap_u, gap_v) = rng.uniform(6, 15), rng.uniform(7, 17), rng.uniform(0.25, 0.5, 2)
    panes = (u / bay % 1 > gap_u) & (v / storey % 1 > gap_v) & (v > 0) & (v < tall - 5)
    table = rng.uniform(0.5, 1.8, (8, 8)).astype(np.float32)  # each pane reflects something else
    pane = lit(rgb("#374150"), table[(v // storey).astype(int) % 8, (u // bay).astype(int) % 8])
    courses = v / rng.uniform(2, 4) % 1 < 0.35
    light = 1 + canvas.noise(window, (1, 0.06), (40, 0.12)) - np.float32(0.1) * courses
    light[u > wide * rng.uniform(0.4, 1.2)] *= np.float32(0.72)  # the side in the shade
    light[v < 0] *= np.float32(0.6)  # the roof
    facade = np.where(panes[..., None], pane, lit(canvas.colour(BUILDING), light))
    haze = rng.uniform(0, 0.4) * max(0.0, 1 - depth / 20)
    region = canvas.stencil(window, [(1, outline)]) > 0
    canvas.paint(window, region, facade * np.float32(1 - haze) + np.float32(185 * haze), BUILDING, ring=0.2)


def paint_tree(canvas: Canvas, x: float, depth: float, bush: bool) -> None:
    rng, foot = canvas.rng, canvas.grade * x + depth
    wide = depth * rng.uniform(0.3, 0.8) if bush else min(10 + depth * rng.uniform(0.3, 1.1), 60)
    tall = wide * rng.uniform(0.6, 1.3)
    middle = foot - tall * (0.5 if bush else rng.uniform(1.2, 2.0))
    low = max(foot, middle + 1.5 * tall)
    window = canvas.window(box(x - 1.5 * wide, middle - 1.5 * tall, x + 1.5 * wide, low))
    u, v = (canvas.x[window] - x) / wide, (canvas.y[window] - middle) / tall
    crown = u * u + v * v + canvas.noise(window, (12, 0.5), (5, 0.45), (2, 0.3)) < 0.9
    light = 0.9 - 0.25 * v - 0.1 * u + canvas.noise(window, (5, 0.3), (2, 0.35), (1, 0.2))
    if not bush:
        half = max(0.8, wide * 0.07)
        trunk = canvas.stencil(window, [(1, box(x - half, middle, x + half, foot))]) > 0
        bark = lit(rgb("#504132"), 1 + canvas.noise(window, (2, 0.3)))
        canvas.paint(window, trunk, bark, VEGETATION)
    leaves = lit(canvas.colour(VEGETATION), np.maximum(light, 0.15))
    canvas.paint(window, crown & (canvas.y[window] < foot + 2), leaves, VEGETATION)


def paint_vehicle(canvas: Canvas, x: float, depth: float) -> None:
    rng, foot = canvas.rng, canvas.grade * x + depth
    aspect, cameras, parts = VEHICLES[rng.integers(len(VEHICLES))]
    tall = cameras * depth * rng.uniform(0.85, 1.15)
    half = tall * aspect / 2
    side = -half if canvas.chance(0.5) else half  # which way it faces
    window = canvas.window(box(x - half, foot - tall, x + half, foot + 0.1 * tall))
    below = box(x - 1.04 * half, foot - 0.1 * tall, x + 1.04 * half, foot + 0.06 * tall)
    canvas.image[window][canvas.stencil(window, [(1, below)]) > 0] *= np.float32(0.5)  # its shadow
    placed = [(n, [(x + side * (2 * u - 1), foot + tall * (v - 1)) for u, v in part]) for n, part in parts]
    part = canvas.stencil(window, placed)
    height = (foot - canvas.y[window]) / tall  # 0 at the wheels, 1 at the roof
    light = 0.75 + 0.45 * height + canvas.noise(window, (12, 0.08))
    light -= np.float32(0.15) * (np.abs(height - 0.42) < 0.03)
    others = [rgb(code) for code in ("#374150", "#1c1c1e", "#e15a3c", "#c8c8cd")]  # GLASS to CHROME
    table = np.stack([others[0], canvas.colour(VEHICLE), *others])
    canvas.paint(window, part > 0, lit(table[part], light), VEHICLE, ring=0.4)


def paint_pole(canvas: Canvas, x: float, depth: float, signed: bool) -> None:
    """A pole 1 to 4 units wide, sometimes with an arm or a sign."""
    rng, foot = canvas.rng, canvas.grade * x + depth
    half = min(max(0.05 * depth, 1.3), 3.8) / 2
    tall = depth * rng.uniform(1.6, 2.6) if signed else min(depth * rng.uniform(3, 6), 190)
    lean = rng.uniform(-0.05, 0.05)
    arm = depth * rng.uniform(-1.5, 1.5) if canvas.chance(0.4) and not signed else 0.0
    reach = abs(arm) + abs(lean) * tall + 3
    window = canvas.window(box(x - reach, foot - tall - 2, x + reach, foot))
    v = foot - canvas.y[window]  # height over the foot
    u = canvas.x[window] - x - lean * v
    region = (np.abs(u) <= max(half, 0.5 / canvas.unit)) & (v >= 0) & (v <= tall)
    region |= (np.abs(v - tall) <= min(half, 1)) & (min(arm, 0) <= u) & (u <= max(arm, 0))
    light = 1 + 0.35 * np.clip(u / half, -1, 1) + canvas.noise(window, (5, 0.1))
    canvas.paint(window, region, lit(canvas.colour(POLE), light), POLE)
    if signed:
        paint_sign(canvas, x + lean * tall, foot - tall, min(max(0.3 * depth, 5), 12))


def paint_sign(canvas: Canvas, x: float, y: float, radius: float) -> None:
    """A border, a field in it and a bar on the field, in colours of their own."""
    shape, inner = SIGNS[canvas.rng.integers(len(SIGNS))], canvas.rng.uniform(0.6, 0.85)
    rings = [(1, radius, shape), (2, radius * inner, shape), (3, radius, box(-0.4, -0.15, 0.4, 0.15))]
    parts = [(n, [(x + r * u, y + r * v) for u, v in points]) for n, r, points in rings]
    window = canvas.window(box(x - 1.6 * radius, y - radius, x + 1.6 * radius, y + radius))
    part = canvas.stencil(window, parts)
    table = np.stack([canvas.colour(SIGN) for _ in range(4)])
    canvas.paint(window, part > 0, lit(table[part], 1 + canvas.noise(window, (12, 0.08))), SIGN, ring=0.3)


def props(canvas: Canvas, left: float, right: float) -> list[tuple[float, Callable[[], None]]]:
    """What stands on the ground, each thing with its depth. Every second vehicle has something before it."""
    rng, things = canvas.rng, list[tuple[float, Callable[[], None]]]()

    def add(painter: Callable[..., None], x: float, depth: float, *flag: bool) -> None:
        things.append((depth, partial(painter, canvas, x, depth, *flag)))

    def anywhere() -> float:
        return (canvas.width * rng.uniform(-0.1, 1.05) - canvas.centre[0]) / canvas.unit

    for _ in range(rng.integers(3, 9)):
        add(paint_building, anywhere(), rng.uniform(1, 22))
    for _ in range(rng.integers(2, 7)):
        add(paint_tree, anywhere(), rng.uniform(4, 40), canvas.chance(0.35))
    for _ in range(rng.integers(2, 6)):
        depth = 10 + 55 * rng.random() * rng.random()
        x = depth * (rng.uniform(0.1, 0.9) * (left + right) - left)
        add(paint_vehicle, x, depth)
        if canvas.chance(0.5):
            bush = canvas.chance(0.5)
            add(paint_tree if bush else paint_pole, x + depth * rng.uniform(-0.8, 0.8), depth + 2, bush)
    for signed in (False, False, False, True, True, True):
        if canvas.chance(0.6):
            add(paint_pole, anywhere(), rng.uniform(10, 70), signed)
    return things


def photograph(canvas: Canvas) -> Bytes:
    """A cast shadow, the light's strength and tint, a little blur and the sensor's noise."""
    rng = canvas.rng
    edge = canvas.x * rng.uniform(-1, 1) + canvas.y * rng.uniform(-1, 1) + rng.uniform(-90, 90)
    shadow = 1 - rng.uniform(0, 0.5) * np.clip(edge / rng.uniform(4, 40), 0, 1)
    tint = (rng.uniform(0.8, 1.3) * rng.uniform(0.92, 1.08, 3)).astype(np.float32)
    image = lit(canvas.image * tint, shadow) + rng.uniform(-10, 15)
    side = rng.uniform(0.06, 0.25)
    for _ in range(2):  # along the height; then, turned, along the width
        wide = np.pad(image, ((1, 1), (0, 0), (0, 0)), "edge")
        image = (image + side * (wide[:-2] - 2 * image + wide[2:])).transpose(1, 0, 2)
    image = image + rng.uniform(2, 6) * (2 * rng.random(image.shape, np.float32) - 1)
    photo: Bytes = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return photo


def render_scene(seed: int, index: int, size: tuple[int, int] = (192, 256)) -> tuple[Bytes, Bytes]:
    """Scene `index` of series `seed`: an image (H, W, 3) and its class ids (H, W), 255 where unlabelled.

    Sizes of the same proportions show the same things.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    canvas = Canvas(rng, size)
    left, right = rng.uniform(0.6, 4.5, 2).tolist()
    paint_sky(canvas)
    paint_ground(canvas, left, right)
    for _, painter in sorted(props(canvas, left, right), key=lambda thing: thing[0]):
        painter()
    if canvas.chance(0.3):  # nobody labelled this patch
        (x, y), (wide, tall) = rng.uniform(-80, 80, 2), rng.uniform(8, 30, 2)
        patch = [(x, y), (x + wide, y), (x + tall, y + 15), (x - 5, y + tall)]
        window = canvas.window(patch)
        canvas.mask[window][canvas.stencil(window, [(1, patch)]) > 0] = IGNORE
    step = -1 if canvas.chance(0.5) else 1
    return np.ascontiguousarray(photograph(canvas)[:, ::step]), np.ascontiguousarray(canvas.mask[:, ::step])


def write_scenes(
    folder: Path,
    *,
    train: int = 160,
    val: int = 32,
    unlabelled: int = 40,
    size: tuple[int, int] = (192, 256),
    seed: int = 0,
) -> None:
    """Write the data set in the default layout: images/ and masks/, each with train/ and val/; classes.json.

    unlabelled/ beside them holds images to segment in bulk, in a/ and b/ under the same names. A reader never
    sees half of it: the folder appears by one rename. Where it already is, with the same parameters (they are
    in scenes.json), nothing is done. UsageError if `folder` holds anything else.
    """
    recipe = {"version": VERSION, "seed": seed, "size": list(size)}
    recipe |= {"train": train, "val": val, "unlabelled": unlabelled}
    if _holds(folder, recipe):
        return
    # Each part counts from its own index, so that its scenes do not depend on how many the others have.
    parts = (
        ("images/train", "masks/train", 0, train),
        ("images/val", "masks/val", 1_000_000, val),
        ("unlabelled/a", None, 2_000_000, (unlabelled + 1) // 2),
        ("unlabelled/b", None, 3_000_000, unlabelled // 2),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # What is renamed lies inside the temporary folder, whose own permissions would shut other users out.
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        whole = Path(temporary, folder.name)
        for images, masks, first, count in parts:
            scenes = (render_scene(seed, index, size) for index in range(first, first + count))
            _write_part(scenes, whole / images, whole / masks if masks else None)
        classes = {"name": "scenes", "ignore_index": IGNORE, "classes": CLASSES}
        (whole / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
        (whole / "scenes.json").write_text(json.dumps(recipe, indent=1) + "\n")
        try:
            whole.rename(folder)
        except OSError:
            if not _holds(folder, recipe):  # else another process was quicker, with the same scenes
                raise


def _holds(folder: Path, recipe: dict[str, Any]) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    receipt = folder / "scenes.json"
    if receipt.exists() and json.loads(receipt.read_text()) == recipe:
        return True
    raise UsageError(f"{folder} holds something other than {recipe}: remove it or name another folder")


def _write_part(scenes: Iterable[tuple[Bytes, Bytes]], images: Path, masks: Path | None) -> None:
    palette = [channel for entry in CLASSES for channel in entry["color"]]
    palette += [0] * (3 * 256 - len(palette))  # all 256 colours, else Pillow packs two ids into a byte
    for folder in filter(None, (images, masks)):
        folder.mkdir(parents=True)
    for number, (image, mask) in enumerate(scenes):
        Image.fromarray(image).save(images / f"{number:04d}.jpg", quality=92)
        if masks:
            indexed = Image.fromarray(mask)
            indexed.putpalette(palette)
            indexed.save(masks / f"{number:04d}.png")
