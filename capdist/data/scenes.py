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
IMAGE_SIZE = 64
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
# Backgrounds from top to bottom: share of the height, colour at the upper edge, colour at the lower edge.
_BANDS: dict[str, list[tuple[float, Colour, Colour]]] = {
    "meadow": [(0.5, (150, 205, 245), (215, 238, 250)), (0.5, (150, 212, 100), (110, 185, 75))],
    "beach": [
        (0.35, (175, 220, 245), (225, 243, 250)),
        (0.25, (40, 150, 185), (110, 205, 215)),
        (0.40, (238, 218, 165), (225, 196, 135)),
    ],
    "night": [(1.0, (14, 18, 52), (44, 46, 98))],
    "sunset": [(0.7, (125, 95, 150), (255, 190, 140)), (0.3, (205, 120, 115), (150, 85, 105))],
    "snow": [(0.4, (165, 180, 200), (205, 215, 226)), (0.6, (236, 241, 248), (222, 230, 242))],
    "paper": [(1.0, (250, 246, 228), (250, 246, 228))],
}
# How often each layout is drawn, in percent. Most scenes have two shapes and one relation; the others add variety.
LAYOUTS = {"left": 38, "above": 30, "inside": 14, "single": 8, "row": 10}
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
    plain = f"{one}, {two} and {three} {place}"
    return [
        plain,
        f"there is {plain}",
        f"{one}, {two} and {three} in a row {place}",
        f"{two} between {one} and {three} {place}",
        f"{place} there is {one}, {two} and {three}",
        f"three shapes, {plain}",
    ]


def _sized(shape: Shape, rng: random.Random) -> str:
    return shape.words(rng.choice(SIZES[shape.size]))


# --- pixels -----------------------------------------------------------------------------------------------


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw `scene` as an RGB image of `IMAGE_SIZE` x `IMAGE_SIZE`; `rng` moves the shapes a little."""
    canvas = _background(scene.background).copy()
    pen = ImageDraw.Draw(canvas)
    edge = _LIGHT if scene.background == "night" else _DARK
    placed = list(zip(scene.shapes, _places(scene, rng), strict=True))
    for shape, (centre, radius) in reversed(placed):  # what is inside something is drawn after it
        _draw_shape(pen, shape, centre, radius, edge)
    return canvas.reduce(_SCALE)


def _places(scene: Scene, rng: random.Random) -> Iterator[tuple[Point, float]]:
    """Yield centre and radius of each shape in pixels of the finished image."""

    def jitter(centre: float, reach: float) -> float:
        return centre + rng.uniform(-reach, reach)

    if scene.layout == "inside":
        middle = (jitter(32, 5), jitter(32, 5))
        yield middle, jitter(9.5, 0.5)
        yield middle, jitter(24, 1.5)
        return
    centres = {
        "single": [(jitter(32, 12), jitter(32, 12))],
        "left": [(jitter(16.5, 1.5), jitter(32, 7)), (jitter(47.5, 1.5), jitter(32, 7))],
        "above": [(jitter(32, 7), jitter(16.5, 1.5)), (jitter(32, 7), jitter(47.5, 1.5))],
        "row": [(jitter(x, 0.7), jitter(32, 6)) for x in (11, 32, 53)],
    }[scene.layout]
    for shape, centre in zip(scene.shapes, centres, strict=True):
        yield centre, jitter(13.5 if shape.size == "large" else 9.0, 0.5)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, centre: Point, radius: float, edge: Colour) -> None:
    (x, y), r = (centre[0] * _SCALE, centre[1] * _SCALE), radius * _SCALE
    fill, line = COLOURS[shape.colour], _SCALE
    if shape.form == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill, edge, line)
    elif shape.form == "ring":  # an edge, a band of colour and an edge again; what lies behind shows in the hole
        pen.ellipse((x - r, y - r, x + r, y + r), None, edge, round(r * 0.45) + line)
        pen.ellipse((x - r + line, y - r + line, x + r - line, y + r - line), None, fill, round(r * 0.45) - line)
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
        arm = [(-0.34, -1.0), (0.34, -1.0), (0.34, -0.34)]
        return [point for quarter in range(4) for point in (_turned(corner, quarter * 90) for corner in arm)]
    assert form == "star"
    return [_turned((0, -1.1 if corner % 2 == 0 else -0.46), corner * 36) for corner in range(10)]


def _turned(point: Point, degrees: float) -> Point:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return point[0] * c - point[1] * s, point[0] * s + point[1] * c


@cache
def _background(name: str) -> Image.Image:
    """Return the empty canvas of a background, `_SCALE` times the final size."""
    side = IMAGE_SIZE * _SCALE
    canvas = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(canvas)
    bottom = 0
    for height, above, below in _BANDS[name]:
        top, bottom = bottom, round(bottom + height * side)
        for row in range(top, bottom):
            share = (row - top) / (bottom - top)
            colour = tuple(round(a + (b - a) * share) for a, b in zip(above, below, strict=True))
            pen.line((0, row, side, row), colour)
    rng = random.Random("stars")
    for _ in range(26 if name == "night" else 0):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), rng.choice((1.0, 1.5, 2.0))
        pen.ellipse((x - r, y - r, x + r, y + r), (235, 235, 205))
    for at in range(12, side if name == "paper" else 0, 24):
        pen.line((at, 0, at, side), (185, 200, 222), 2)
        pen.line((0, at, side, at), (185, 200, 222), 2)
    return canvas
