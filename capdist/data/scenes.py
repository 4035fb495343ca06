"""Drawn scenes with captions: a data set that needs no file and no network, for first runs and for tests.

A scene is one to three coloured shapes in front of a background. Its symbolic description decides both the
drawing and the five captions, so every caption is true. Descriptions are unique over all splits: no test
scene was seen in training. The same scenes come out in every process.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SPLIT_SIZES = {"train": 2_000, "validation": 200, "test": 200}
IMAGE_SIZE = 128
CAPTIONS_PER_SCENE = 5

COLOURS = {
    "red": (222, 38, 42),
    "yellow": (250, 225, 45),
    "green": (30, 150, 60),
    "blue": (35, 85, 220),
    "purple": (140, 50, 175),
    "white": (252, 252, 252),
    "black": (25, 25, 28),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
BACKGROUNDS = {
    "meadow": "on a meadow",
    "beach": "at the beach",
    "night": "in the night sky",
    "sunset": "at sunset",
    "snow": "in the snow",
    "paper": "on squared paper",
}
# Backgrounds are painted from top to bottom: share of the height where a band begins, height of the waves of that line,
# colour at the line, colour at the lower edge of the picture.
_BANDS: dict[str, list[tuple[float, float, Colour, Colour]]] = {
    "meadow": [
        (0.0, 0.0, (140, 198, 245), (245, 250, 252)),
        (0.48, 0.025, (165, 222, 115), (125, 195, 85)),
        (0.66, 0.02, (140, 208, 95), (95, 170, 65)),
    ],
    "beach": [
        (0.0, 0.0, (165, 214, 245), (250, 250, 250)),
        (0.35, 0.0, (40, 150, 185), (175, 240, 235)),
        (0.60, 0.015, (245, 228, 180), (222, 192, 130)),
    ],
    "night": [(0.0, 0.0, (14, 18, 52), (50, 52, 108))],
    "sunset": [(0.0, 0.0, (115, 90, 150), (255, 205, 150)), (0.7, 0.012, (190, 105, 110), (135, 75, 100))],
    "snow": [(0.0, 0.0, (150, 168, 192), (225, 233, 240)), (0.42, 0.025, (240, 244, 250), (218, 228, 241))],
    "paper": [(0.0, 0.0, (250, 246, 228), (250, 246, 228))],
}
_DOTS = {"night": (34, (235, 235, 205)), "snow": (44, (250, 252, 255))}  # stars and flakes: how many, their colour
# How often each layout is drawn, in percent. Most scenes have two shapes and one relation; the others add variety.
LAYOUTS = {"left": 34, "above": 27, "inside": 13, "single": 16, "row": 10}
SIZES = {"large": ("large", "big"), "small": ("small", "little")}

_SCALE = 3  # drawn this many times larger, then reduced: smooth edges
_DARK, _LIGHT = (30, 30, 40), (245, 245, 235)


@dataclass(frozen=True)
class Shape:
    """One coloured shape: words of `COLOURS`, `SHAPES` and `SIZES`."""

    colour: str
    form: str
    size: str

    def words(self, size: str = "") -> str:
        """Return e.g. `a red star`, or `a large red star` for the size word `large`."""
        words = " ".join(filter(None, (size, self.colour, self.form)))
        return f"an {words}" if words[0] in "aeiou" else f"a {words}"


@dataclass(frozen=True)
class Scene:
    """The symbolic description: a word of `LAYOUTS`, a word of `BACKGROUNDS`, one to three shapes.

    In the layout `left` the first shape is left of the second, in `above` above it, in `inside` inside it.
    """

    layout: str
    background: str
    shapes: tuple[Shape, ...]


def build_scenes(limit: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Draw the data set.

    Args:
        limit: Keeps only this many scenes of each split, the first ones; None = all.

    Returns:
        For each split its rows `{"image_id": str, "image": {"path": None, "bytes": PNG}, "captions": [str]}`.
    """
    return {
        split: [_row(f"scene_{split}_{number:05d}", scene) for number, scene in enumerate(scenes[:limit])]
        for split, scenes in describe_scenes().items()
    }


@cache
def describe_scenes() -> dict[str, tuple[Scene, ...]]:
    """Return the descriptions of all scenes by split, each different from every other."""
    rng = random.Random("capdist scenes")
    scenes: dict[Scene, None] = {}  # a set that remembers the order
    while len(scenes) < sum(SPLIT_SIZES.values()):
        scenes.setdefault(_random_scene(rng))
    remaining = iter(scenes)
    return {split: tuple(next(remaining) for _ in range(size)) for split, size in SPLIT_SIZES.items()}


def _random_scene(rng: random.Random) -> Scene:
    layout = rng.choices(list(LAYOUTS), weights=list(LAYOUTS.values()))[0]
    count = {"single": 1, "row": 3}.get(layout, 2)
    colours = rng.sample(list(COLOURS), count)
    # Shapes of a scene differ in colour and form: each caption then points at exactly one of them.
    forms = rng.sample(SHAPES, count)
    sizes = [rng.choice(("large", "small")) for _ in range(count)]
    if layout == "row":
        sizes = ["small"] * count
    if layout == "inside":
        forms[1] = rng.choice([form for form in ("circle", "square") if form != forms[0]])
        sizes = ["small", "large"]
    shapes = tuple(Shape(*words) for words in zip(colours, forms, sizes, strict=True))
    return Scene(layout, rng.choice(list(BACKGROUNDS)), shapes)


def _row(image_id: str, scene: Scene) -> dict[str, Any]:
    rng = random.Random(image_id)
    buffer = io.BytesIO()
    draw_scene(scene, rng).save(buffer, "PNG", compress_level=3)
    image = {"path": None, "bytes": buffer.getvalue()}
    return {"image_id": image_id, "image": image, "captions": write_captions(scene, rng)}


# --- words -----------------------------------------------------------------------------------------------


def write_captions(scene: Scene, rng: random.Random) -> list[str]:
    """Return five different true captions of `scene`, the plainest first."""
    place = BACKGROUNDS[scene.background]
    plain, *others = _sentences(scene, rng, place)
    captions = [plain, *rng.sample(others, CAPTIONS_PER_SCENE - 1)]
    return [f"{caption[0].upper()}{caption[1:]}." for caption in captions]


def _sentences(scene: Scene, rng: random.Random, place: str) -> list[str]:
    if scene.layout == "single":
        return _sentences_for_one(scene.shapes[0], rng, place)
    if scene.layout == "row":
        return _sentences_for_three(scene.shapes, rng, place)
    return _sentences_for_two(scene, rng, place)


def _sentences_for_one(shape: Shape, rng: random.Random, place: str) -> list[str]:
    common, rare = SIZES[shape.size]
    return [
        f"{shape.words(common)} {place}",
        f"there is {shape.words(common)} {place}",
        f"{shape.words()} {place}",
        f"{shape.words(rare)} {place}",
        f"{place} there is {shape.words(rng.choice((common, rare)))}",
        f"one {common} {shape.colour} {shape.form} {place}",
    ]


def _sentences_for_two(scene: Scene, rng: random.Random, place: str) -> list[str]:
    first, second = scene.shapes
    relation, synonym, inverse = {
        "left": ("left of", "to the left of", "right of"),
        "above": ("above", "over", "below"),
        "inside": ("inside", "in the middle of", "around"),
    }[scene.layout]
    plain = f"{first.words()} {relation} {second.words()} {place}"
    sized = f"{_sized(first, rng)} {relation} {_sized(second, rng)} {place}"
    return [
        plain,
        sized,
        f"there is {plain}",
        f"{place} there is {first.words()} {relation} {second.words()}",
        f"{first.words()} {synonym} {second.words()} {place}",
        f"{second.words()} {inverse} {first.words()} {place}",
        f"{first.words()} and {second.words()} {place}",
    ]


def _sentences_for_three(shapes: tuple[Shape, ...], rng: random.Random, place: str) -> list[str]:
    one, two, three = (shape.words() for shape in shapes)
    plain = f"{one} beside {two} and {three} {place}"
    return [
        plain,
        f"there is {plain}",
        f"{one} beside {two} and {three} in a row {place}",
        f"{two} between {one} and {three} {place}",
        f"{place} there is {one} beside {two} and {three}",
        f"{one} and {two} and {three} {place}",
    ]


def _sized(shape: Shape, rng: random.Random) -> str:
    return shape.words(rng.choice(SIZES[shape.size]))


# --- pixels -----------------------------------------------------------------------------------------------


def draw_scene(scene: Scene, rng: random.Random, side: int = IMAGE_SIZE) -> Image.Image:
    """Draw a scene.

    Args:
        scene: What to draw.
        rng: Moves the shapes and changes their sizes a little.
        side: Width and height in pixels. The same `rng` gives the same drawing at every size.

    Returns:
        An RGB image of `side` x `side` pixels.
    """
    canvas = _background(scene.background, side * _SCALE).copy()
    pen = ImageDraw.Draw(canvas)
    edge = _LIGHT if scene.background == "night" else _DARK
    placed = list(zip(scene.shapes, _places(scene, rng), strict=True))
    for shape, (centre, radius) in reversed(placed):  # what is inside something is drawn after it
        _draw_shape(pen, canvas.width, shape, centre, radius, edge)
    return canvas.reduce(_SCALE)


def _places(scene: Scene, rng: random.Random) -> Iterator[tuple[Point, float]]:
    """Yield centre and radius of each shape as shares of the side."""

    def jitter(centre: float, reach: float) -> float:
        return centre + rng.uniform(-reach, reach)

    if scene.layout == "inside":
        middle = (jitter(0.5, 0.07), jitter(0.5, 0.07))
        yield middle, jitter(0.175, 0.008)
        yield middle, jitter(0.375, 0.023)
        return
    centres = {
        "single": [(jitter(0.5, 0.19), jitter(0.5, 0.19))],
        "left": [(jitter(0.258, 0.023), jitter(0.5, 0.11)), (jitter(0.742, 0.023), jitter(0.5, 0.11))],
        "above": [(jitter(0.5, 0.11), jitter(0.258, 0.023)), (jitter(0.5, 0.11), jitter(0.742, 0.023))],
        "row": [(jitter(x, 0.01), jitter(0.5, 0.09)) for x in (0.172, 0.5, 0.828)],
    }[scene.layout]
    for shape, centre in zip(scene.shapes, centres, strict=True):
        yield centre, jitter(0.21 if shape.size == "large" else (0.145 if scene.layout == "row" else 0.155), 0.007)


def _draw_shape(pen: ImageDraw.ImageDraw, side: int, shape: Shape, centre: Point, radius: float, edge: Colour) -> None:
    x, y, r = (share * side for share in (*centre, radius))
    fill, line = COLOURS[shape.colour], round(0.016 * side)
    if shape.form == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill, edge, line)
    elif shape.form == "ring":  # an edge, a band of colour and an edge again; what lies behind shows in the hole
        band = round(r * 0.4)
        pen.ellipse((x - r, y - r, x + r, y + r), None, edge, band + line)
        pen.ellipse((x - r + line, y - r + line, x + r - line, y + r - line), None, fill, band - line)
    else:
        pen.polygon([(x + r * a, y + r * b) for a, b in _outline(shape.form)], fill, edge, line)


@cache
def _outline(form: str) -> list[Point]:
    """Return the corners of a shape of radius 1 around the origin, y downwards."""
    if form == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if form == "triangle":
        return [(0, -0.95), (1, 0.8), (-1, 0.8)]
    if form == "cross":
        arm = [(-0.3, -1.0), (0.3, -1.0), (0.3, -0.3)]
        return [point for quarter in range(4) for point in (_turned(corner, quarter * 90) for corner in arm)]
    assert form == "star"
    return [_turned((0, -1.1 if corner % 2 == 0 else -0.44), corner * 36) for corner in range(10)]


def _turned(point: Point, degrees: float) -> Point:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return point[0] * c - point[1] * s, point[0] * s + point[1] * c


@cache
def _background(name: str, side: int) -> Image.Image:
    """Return the empty canvas of a background."""
    canvas = Image.new("RGB", (side, side))
    for band in _BANDS[name]:
        _paint_band(canvas, *band)
    pen, rng = ImageDraw.Draw(canvas), random.Random("dots")
    count, colour = _DOTS.get(name, (0, _LIGHT))
    for _ in range(count):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), side * rng.uniform(0.004, 0.01)
        pen.ellipse((x - r, y - r, x + r, y + r), colour)
    for number in range(8 if name == "paper" else 0):
        at = (number + 0.5) * side / 8
        pen.line((at, 0, at, side), (185, 200, 222), round(0.01 * side))
        pen.line((0, at, side, at), (185, 200, 222), round(0.01 * side))
    return canvas


def _paint_band(canvas: Image.Image, top: float, wave: float, above: Colour, below: Colour) -> None:
    """Paint all that lies below a wavy line, from one colour at the line to another at the lower edge."""
    side = canvas.width
    first = math.floor((top - wave) * side)
    colours, mask = Image.new("RGB", (side, side)), Image.new("L", (side, side))
    pen = ImageDraw.Draw(colours)
    for row in range(first, side):
        share = (row - first) / (side - first)
        pen.line((0, row, side, row), tuple(round(a + (b - a) * share) for a, b in zip(above, below, strict=True)))
    line = [(x, side * (top + wave * math.sin(7 * x / side + 20 * top))) for x in range(side + 1)]
    ImageDraw.Draw(mask).polygon([*line, (side, side), (0, side)], 255)
    canvas.paste(colours, mask=mask)
