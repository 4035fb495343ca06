"""Pictures: photos with their captions, and what each word looked at."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


def _figure(columns: int, rows: int, side: float, row_height: float) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, without pyplot: no display, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * side, rows * row_height), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes:
        axis.axis("off")
    return figure, axes


def save_samples(photos: Sequence[Image.Image], titles: Sequence[str], path: Path, title: str) -> None:
    """Save photos in rows of four, each with its caption below.

    Args:
        photos: RGB, each drawn to the same size.
        titles: Text to write below each photo.
        path: PNG file to write.
        title: The line that is written above all photos.
    """
    columns = min(4, len(photos))
    figure, axes = _figure(columns, math.ceil(len(photos) / columns), 2.9, 3.5)
    figure.suptitle(title, fontsize=11)
    for axis, photo, text in zip(axes, photos, titles, strict=False):
        axis.imshow(photo)
        axis.set_title(textwrap.fill(text, 34), fontsize=8.5, y=-0.02, pad=0, va="top")
    figure.savefig(path)


def save_attention(photo: Image.Image, words: Sequence[str], attention: Tensor, path: Path) -> None:
    """Save a copy of a photo for each word, bright where the word looked.

    Args:
        photo: RGB, of any size; it is shown with at most 384 pixels a side.
        words: The words of the caption; each gets a picture.
        attention: (words, cells), the cells of a square grid row by row.
        path: PNG file to write.
    """
    side = math.isqrt(attention.shape[1])
    columns = min(6, len(words) + 1)
    figure, axes = _figure(columns, math.ceil((len(words) + 1) / columns), 2.0, 2.3)
    shown = photo.copy()
    shown.thumbnail((384, 384))
    axes[0].imshow(shown)
    axes[0].set_title("photo", fontsize=9)
    pixels = np.asarray(shown, dtype=np.float32) / 255
    for axis, word, weights in zip(axes[1:], words, attention, strict=False):
        grid = weights.reshape(side, side).numpy()
        mask = Image.fromarray(grid / grid.max()).resize(shown.size, Image.Resampling.BICUBIC)
        light = np.clip(np.asarray(mask), 0, 1)[..., None]
        axis.imshow(pixels * (0.2 + 0.8 * light))
        axis.set_title(word, fontsize=9)
    figure.savefig(path)
