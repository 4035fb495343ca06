"""Pictures: photos with their captions, and what each word looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

# Lengths are inches, sizes of letters are points. Four columns are 1,044 pixels: a README shows about 900 of them.
_DPI = 90
_SAMPLE_COLUMNS, _SAMPLE_SIDE = 4, 2.9
_ATTENTION_COLUMNS, _ATTENTION_SIDE = 6, 2.0
_MARGIN, _SPACE, _AFTER_PARAGRAPH = 0.07, 0.2, 0.04
_PHOTO_SIDE = _SAMPLE_SIDE - 2 * _MARGIN
_TEXT_WIDTH = _PHOTO_SIDE - _MARGIN
_LINE = 1.3  # height of a line as a share of the size of its letters
_BLACK, _GREY = "black", "#6a6a6a"
_STRIP_TITLE = "what each word looked at more than the other words did"

STRIP_WORDS = 11
"""Words of a caption that a strip below samples shows in one row, beside the photo."""


@dataclass(frozen=True)
class Sample:
    """A photo beside what a model and a person say of it.

    Attributes:
        photo: RGB, of any size.
        caption: The caption of the model.
        reference: The caption of a person.
        score: Names and values of scores of the caption.
    """

    photo: Image.Image
    caption: str
    reference: str
    score: str

    @property
    def paragraphs(self) -> tuple[tuple[str, float, str], ...]:
        """Text, size of the letters and colour of each paragraph below the photo."""
        return (self.caption, 11, _BLACK), (self.reference, 9, _GREY), (self.score, 9, _GREY)


@dataclass(frozen=True)
class Looks:
    """What each word of a caption looked at.

    Attributes:
        photo: RGB, of any size.
        words: The words of the caption.
        attention: (words, cells), each row sums to one; the cells of a square grid row by row.
    """

    photo: Image.Image
    words: Sequence[str]
    attention: Tensor


class _Page:
    """A figure without pyplot: no display, no global state. Places are inches from the upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self._figure: Any = Figure(figsize=(width, height), dpi=_DPI)

    def show(self, picture: Image.Image | NDArray[np.float32], left: float, top: float, side: float) -> None:
        """Show a picture, RGB, at the bottom of a square."""
        place = (left / self.width, 1 - (top + side) / self.height, side / self.width, side / self.height)
        axis = self._figure.add_axes(place, anchor="S")
        axis.axis("off")
        axis.imshow(picture, interpolation="bilinear")

    def write(self, lines: Sequence[str], middle: float, top: float, size: float, colour: str = _BLACK) -> float:
        """Write lines around a vertical axis, and return where the next paragraph starts."""
        for line in lines:
            top += _LINE * size / 72
            # On the baseline, so that words side by side are level; dollar signs are not mathematics.
            style = {"ha": "center", "va": "baseline", "parse_math": False}
            self._figure.text(middle / self.width, 1 - top / self.height, line, size=size, color=colour, **style)
        return top + _AFTER_PARAGRAPH

    def save(self, path: Path) -> None:
        """Write a PNG file."""
        self._figure.savefig(path, pil_kwargs={"optimize": True})


def save_samples(samples: Sequence[Sample], path: Path, title: str, looks: Looks | None = None) -> None:
    """Save photos in rows of four, each with its caption, reference and score below, and one photo word by word.

    Args:
        samples: At least one.
        path: PNG to write.
        title: Written above all.
        looks: What each word of one of the captions looked at; None = show no attention.
    """
    columns = min(_SAMPLE_COLUMNS, len(samples))
    width = columns * _SAMPLE_SIDE
    rows = [samples[at : at + columns] for at in range(0, len(samples), columns)]
    heading, subheading = _lines(title, 13, width), _lines(_STRIP_TITLE, 11, width)
    height = _height(heading, 13) + _SPACE + sum(map(_row_height, rows))
    tiles = (0, 0.0)
    if looks is not None:
        tiles = _strip_tiles(looks, width)
        height += _height(subheading, 11) + _strip_height(looks, *tiles)
    page = _Page(width, height)
    top = page.write(heading, width / 2, 0, 13) + _SPACE
    for row in rows:
        _draw_row(page, row, top)
        top += _row_height(row)
    if looks is not None:
        _draw_looks(page, looks, page.write(subheading, width / 2, top, 11), *tiles)
    page.save(path)


def save_attention(photo: Image.Image, words: Sequence[str], attention: Tensor, path: Path) -> None:
    """Save a photo once a word, bright where the word looked more than the other words did.

    Args:
        photo: RGB, of any size.
        words: The words of the caption.
        attention: (words, cells), the cells of a square grid row by row.
        path: PNG file to write.
    """
    looks = Looks(photo, words, attention)
    columns = min(_ATTENTION_COLUMNS, len(words) + 1)
    page = _Page(columns * _ATTENTION_SIDE, _strip_height(looks, columns, _ATTENTION_SIDE))
    _draw_looks(page, looks, 0.0, columns, _ATTENTION_SIDE)
    page.save(path)


def light_of_words(attention: Tensor) -> NDArray[np.float32]:
    """Return how bright each cell is shown for each word.

    A trained model often gives all words of a caption much the same attention, so maps of it look alike. This shows
    the difference to the mean over the words, all words on one scale.

    Args:
        attention: (words, cells).

    Returns:
        (words, cells) in 0…1: 0.4 where a word looks as much as the mean of the words, 1 at the largest surplus.
    """
    surplus = (attention - attention.mean(dim=0)).float().cpu().numpy()
    largest = float(surplus.max()) if surplus.size else 0.0
    share = surplus / largest if largest > 1e-6 else np.zeros_like(surplus)
    light: NDArray[np.float32] = np.clip(0.4 + 0.6 * share, 0, 1).astype(np.float32)
    return light


def _draw_row(page: _Page, samples: Sequence[Sample], top: float) -> None:
    shown = max(map(_height_of_photo, samples))
    for column, sample in enumerate(samples):
        left = column * _SAMPLE_SIDE + _MARGIN
        page.show(_at_size(sample.photo, _PHOTO_SIDE), left, top + shown - _PHOTO_SIDE, _PHOTO_SIDE)
        below = top + shown
        for text, size, colour in sample.paragraphs:
            below = page.write(_lines(text, size, _TEXT_WIDTH), left + _PHOTO_SIDE / 2, below, size, colour)


def _row_height(samples: Sequence[Sample]) -> float:
    texts = [sum(_height(_lines(text, size, _TEXT_WIDTH), size) for text, size, _ in s.paragraphs) for s in samples]
    return max(map(_height_of_photo, samples)) + max(texts) + _SPACE


def _height_of_photo(sample: Sample) -> float:
    """Return the height of a photo that fits into its square; wide photos need less than a square."""
    return _PHOTO_SIDE * min(1.0, sample.photo.height / sample.photo.width)


def _lines(text: str, size: float, width: float) -> list[str]:
    """Break a text into lines of `width`; a word that is longer than a line is broken too."""
    lines = [""]
    for word in text.split():
        if lines[-1] and _width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if _width(lines[-1] + letter, size) > width:
                lines.append("")
            lines[-1] += letter
    return lines[1:] or lines


def _width(text: str, size: float) -> float:
    """Return the width of a text in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)[0]) / 72


def _height(lines: Sequence[str], size: float) -> float:
    """Return the height that `_Page.write` needs for a paragraph."""
    return len(lines) * _LINE * size / 72 + _AFTER_PARAGRAPH


def _strip_tiles(looks: Looks, width: float) -> tuple[int, float]:
    """Return the columns of the photo and its words, in rows of equal length, and the width of a column."""
    tiles = len(looks.words) + 1
    columns = max(4, math.ceil(tiles / math.ceil(tiles / (STRIP_WORDS + 1))))
    return columns, width / columns


def _strip_height(looks: Looks, columns: int, side: float) -> float:
    return math.ceil((len(looks.words) + 1) / columns) * (side + _height([""], 10))


def _draw_looks(page: _Page, looks: Looks, top: float, columns: int, side: float) -> None:
    """Draw the photo and then the photo as each word looked at it, in rows of `columns` tiles of `side`."""
    cells = math.isqrt(looks.attention.shape[1])
    photo = _at_size(looks.photo, side - 2 * _MARGIN)
    pixels = np.asarray(photo, dtype=np.float32) / 255
    pictures: list[Any] = [photo]
    for light in light_of_words(looks.attention):
        mask = Image.fromarray(light.reshape(cells, cells)).resize(photo.size, Image.Resampling.BICUBIC)
        pictures.append(pixels * (0.15 + 0.85 * np.clip(np.asarray(mask), 0, 1)[..., None]))
    for number, (picture, word) in enumerate(zip(pictures, ("photo", *looks.words), strict=True)):
        row, column = divmod(number, columns)
        upper = top + row * (side + _height([""], 10))
        page.show(picture, column * side + _MARGIN, upper + _MARGIN, side - 2 * _MARGIN)
        page.write([word], (column + 0.5) * side, upper + side - _MARGIN, 10)


def _at_size(photo: Image.Image, side: float) -> Image.Image:
    """Return a photo as large as it is shown, so that drawings of few pixels are smooth."""
    pixels = round(side * _DPI)
    return ImageOps.contain(photo, (pixels, pixels), Image.Resampling.LANCZOS)
