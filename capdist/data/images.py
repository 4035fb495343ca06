"""Photos: decode, resize, augment, normalise. One code for training, evaluation and captioning.

Shapes: S pixels a side. Photos stay uint8 until they are on the device.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from capdist.errors import DataError
from capdist.recipe.sections import DataSection

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Formats that are opened; file names do not matter. The list is short so that damaged files reach few decoders."""

MAX_PIXELS = 100_000_000
"""Photos of more pixels are refused from their header, before memory is spent on them."""

_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""Errors that say nothing about the photo itself; `errors.run_program` knows what to do about each."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a photo before the encoder; it travels in the model folder.

    Attributes:
        image_size: S; the whole photo is squashed to S x S.
        mean: Mean of red, green and blue, each in 0…1.
        std: Standard deviation of red, green and blue, each in 0…1.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def load(self, image: Mapping[str, Any]) -> Tensor:
        """Decode and resize.

        Args:
            image: A row of a `datasets.Image(decode=False)` column: `path` and/or `bytes`.

        Returns:
            uint8 (3, S, S).

        Raises:
            DataError: naming the photo that cannot be decoded.
        """
        return self.resize(open_photo(image, self.image_size))

    def resize(self, photo: Image.Image) -> Tensor:
        """Squash an RGB photo to uint8 (3, S, S)."""
        size = (self.image_size, self.image_size)
        return to_tensor(photo if photo.size == size else photo.resize(size, Image.Resampling.BILINEAR))

    def normalize(self, images: Tensor) -> Tensor:
        """Return `pixel_values`: float, normalised, for uint8 images (…, 3, S, S), on their device."""
        shape = (3, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return (images.float() / 255 - mean) / std


class Augmentation:
    """Random changes of a training photo, each a function of the photo and a seed.

    Args:
        image_size: S, the side of a changed photo in pixels.
        random_crop: Smallest share of the area that is kept; 1 = squash the whole photo.
        horizontal_flip: Mirror the photos of every second seed.
        color_jitter: Largest change of brightness, contrast and saturation, as a share; 0 changes none.
    """

    def __init__(self, image_size: int, *, random_crop: float, horizontal_flip: bool, color_jitter: float) -> None:
        size = (image_size, image_size)
        steps: list[Any] = []
        if random_crop < 1:
            steps.append(v2.RandomResizedCrop(size, scale=(random_crop, 1.0), antialias=True))
        else:
            steps.append(v2.Resize(size, antialias=True))
        if color_jitter:
            steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
        self._transform = v2.Compose(steps)
        self._flips = horizontal_flip

    def mirrors(self, seed: int) -> bool:
        """Return whether a photo is mirrored. Odd seeds mirror it, so the code that reads its captions can know."""
        return self._flips and seed % 2 == 1

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Change a photo, uint8 (3, height, width) to uint8 (3, S, S), leaving torch's generators as they are."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed those of GPUs, too
            changed: Tensor = self._transform(image)
        return changed.flip(-1).contiguous() if self.mirrors(seed) else changed


def build_augmentation(data: DataSection) -> Augmentation | None:
    """Return the augmentation of a recipe, or None if it has none."""
    if not data.augments:
        return None
    return Augmentation(
        data.image_size,
        random_crop=data.random_crop,
        horizontal_flip=data.horizontal_flip,
        color_jitter=data.color_jitter,
    )


def open_photo(image: Mapping[str, Any], smallest_side: int | None = None) -> Image.Image:
    """Decode a photo, upright and RGB.

    Args:
        image: Has `path` and/or `bytes`.
        smallest_side: Lets a JPEG be decoded at an eighth, a quarter or half of its size. Both sides stay at least
            twice this many pixels; None = full size.

    Raises:
        DataError: naming the photo and what is wrong with it.
        OSError: The disk failed, or there are too many open files; the photo may be sound.
    """
    name = image.get("path") or "image"
    data = image.get("bytes")
    try:
        if data is None and os.path.exists(name) and not os.path.isfile(name):
            raise DataError(f"{name}: not a file")
        with Image.open(io.BytesIO(data) if data is not None else name, formats=FORMATS) as photo:
            if photo.width * photo.height > MAX_PIXELS:
                raise DataError(f"{name}: {photo.width}x{photo.height} pixels; photos of up to {MAX_PIXELS:,} are read")
            if smallest_side is not None:
                photo.draft("RGB", (2 * smallest_side, 2 * smallest_side))
            return upright_rgb(photo)
    except FileNotFoundError:
        raise DataError(f"{name}: no such photo") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: {error}") from None
    except DataError:
        raise
    except Exception as error:  # damage makes Pillow's parsers raise errors of many kinds: struct.error, IndexError, …
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE):
            raise
        reason = (
            "not a photo" if "cannot identify" in str(error) else " ".join(str(error).split()) or type(error).__name__
        )
        raise DataError(
            f"{name}: {reason}; readable are {', '.join(FORMATS)}; `capdist check` lists all such photos"
        ) from None


_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_rgb(photo: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF says and make it RGB; transparent parts become white."""
    return _to_rgb(_upright(photo))


def _upright(photo: Image.Image) -> Image.Image:
    photo.load()  # PNG may hold its EXIF behind the pixels: damaged pixels must not look like a damaged tag
    # Not ImageOps.exif_transpose: it rewrites the whole EXIF, and fails on damage in tags that nobody needs.
    try:
        orientation = photo.getexif().get(0x0112)
    except Exception:  # as above; the stored orientation is the best guess
        orientation = None
    method = _TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None
    return photo if method is None else photo.transpose(method)


def _to_rgb(photo: Image.Image) -> Image.Image:
    if photo.mode.startswith("I;16") or photo.mode == "I":
        grey = Image.fromarray((np.asarray(photo) / 257).clip(0, 255).astype(np.uint8))
        transparent = photo.info.get("transparency")
        if transparent is not None:
            grey.putalpha(Image.fromarray(np.where(np.asarray(photo) == transparent, 0, 255).astype(np.uint8)))
        photo = grey
    if photo.mode in ("RGBA", "LA", "PA") or "transparency" in photo.info:
        # Product photos are often cut out: their background becomes white, not the black of a plain conversion.
        photo = photo.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo).convert("RGB")
    return photo.convert("RGB")


def to_tensor(photo: Image.Image) -> Tensor:
    """Return an RGB photo as uint8 (3, height, width)."""
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous()
