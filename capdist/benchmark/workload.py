"""The work that is measured: sizes from a recipe, made-up photos, and captions with the lengths of real ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from capdist.data.captions import CaptionTable
from capdist.data.images import Preprocessing
from capdist.distributed.launch import Accelerator
from capdist.models.caption_model import CaptionModel, build_model
from capdist.recipe.sections import Recipe
from capdist.text.vocabulary import Vocabulary

FLICKR8K_LENGTHS = {
    2: 15, 3: 126, 4: 346, 5: 862, 6: 1957, 7: 2538, 8: 2929, 9: 3318, 10: 3320, 11: 3131, 12: 2775, 13: 2323,
    14: 1848, 15: 1328, 16: 976, 17: 663, 18: 513, 19: 365, 20: 204, 21: 136, 22: 110, 23: 74, 24: 52, 25: 33, 26: 20,
    27: 11, 28: 7, 29: 9, 30: 4, 31: 3, 32: 1, 33: 2, 36: 1,
}  # fmt: skip
"""How many captions of Flickr8k's 6,000 training photos have each number of words, as `capdist.text` splits them."""

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARY_SIZE = 2500
CAPTIONS_OF_AN_IMAGE = 5
PHOTO_SIZE = (500, 375)
"""Width and height of most photos of Flickr8k."""


@dataclass(frozen=True)
class Workload:
    """A recipe made ready to be measured.

    Attributes:
        recipe: Gives the sizes.
        accelerator: Gives the device and the precision, and the processes that take part.
        model: Network with random weights; it is on the device.
        preprocessing: Resizes and normalises photos as the model's encoder needs them.
        num_cells: N, the number of cells of the encoder's grid.
        channels: C, the number of channels of the encoder.
    """

    recipe: Recipe
    accelerator: Accelerator
    model: CaptionModel
    preprocessing: Preprocessing
    num_cells: int
    channels: int

    @classmethod
    def of(cls, recipe: Recipe, accelerator: Accelerator) -> Workload:
        """Build the network of a recipe with random weights.

        Raises:
            UsageError: as `build_model`.
        """
        torch.manual_seed(0)
        model = build_model(
            recipe.encoder, recipe.decoder, vocab_size=VOCABULARY_SIZE, pad_id=Vocabulary.pad_id, load_weights=False
        ).to(accelerator.device)
        preprocessing = Preprocessing(recipe.data.image_size, model.encoder.mean, model.encoder.std)
        size = recipe.data.image_size
        with torch.inference_mode():
            _, num_cells, channels = model.encode(torch.zeros(1, 3, size, size, device=accelerator.device)).shape
        return cls(recipe, accelerator, model, preprocessing, num_cells, channels)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the arithmetic."""
        return DTYPES[str(self.accelerator.mixed_precision)]


def made_up_captions(num_images: int, max_length: int) -> CaptionTable:
    """Return five captions of random words for each image, with Flickr8k's lengths, cut at `max_length` words."""
    generator = np.random.default_rng(0)
    lengths, counts = np.array(list(FLICKR8K_LENGTHS.items())).T
    words = generator.choice(lengths, p=counts / counts.sum(), size=num_images * CAPTIONS_OF_AN_IMAGE)
    labels = np.where(words > max_length, max_length, words + 1)  # with <eos>, unless cut
    starts = np.concatenate([[0], np.cumsum(labels)])
    ids = generator.integers(5, VOCABULARY_SIZE, size=starts[-1], dtype=np.int32)
    ids[starts[1:][words <= max_length] - 1] = Vocabulary.eos_id
    image_starts = np.arange(num_images + 1) * CAPTIONS_OF_AN_IMAGE
    return CaptionTable(ids, starts, image_starts, num_cut=int((words > max_length).sum()), num_empty=0)


def made_up_features(path: Path, num_images: int, num_cells: int, channels: int) -> NDArray[np.float16]:
    """Write features as sparse and as large as those of a ResNet into a file, and map it into memory."""
    shape = (num_images, num_cells, channels)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    block = np.random.default_rng(0).normal(size=shape[1:]).clip(min=0).astype(np.float16)
    for image in range(num_images):
        array[image] = np.roll(block, image, axis=1)
    array.flush()
    mapped: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return mapped


def made_up_photos(folder: Path, count: int) -> list[Path]:
    """Write JPEG photos with the size of Flickr8k's, and about their file size."""
    generator = np.random.default_rng(0)
    paths = [folder / f"{number:05d}.jpg" for number in range(count)]
    for path in paths:
        coarse = generator.integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(PHOTO_SIZE, Image.Resampling.BICUBIC).save(path, quality=95)
    return paths
