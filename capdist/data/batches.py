"""Samples and image-major batches.

Shapes: B images, R captions an image, T words; captions are B·R rows, those of an image side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from capdist.data.captions import CaptionTable, seed_of
from capdist.data.images import Augmentation, Preprocessing, build_augmentation, open_photo, to_tensor
from capdist.errors import DataError
from capdist.recipe.sections import Recipe
from capdist.text.vocabulary import IGNORED_LABEL, Vocabulary

Unreadable = DataError | OSError
"""What a worker returns instead of a sample. An error raised in a worker loses its class and its attributes."""


class SampleKey(NamedTuple):
    """Names a sample; everything random about it is a function of this and the seed.

    Attributes:
        epoch: Counted from 0.
        image: Row of the split, counted from 0.
        part: Number, from 0, of the chunk of the image's captions that is shown.
        is_filler: Whether it only keeps a process in step with the others and has no weight.
    """

    epoch: int
    image: int
    part: int
    is_filler: bool = False


class Sample(NamedTuple):
    """One image and some of its captions.

    Attributes:
        image: Row of the split, counted from 0.
        feature_row: Row of the feature store, which is that of the split unless views are cached.
        pixels: uint8 (3, S, S), or None when features are cached.
        captions: Ids, without `<bos>`; none for a filler.
        is_mirrored: Whether the photo is mirrored, and left and right in its captions are swapped.
    """

    image: int
    feature_row: int
    pixels: Tensor | None
    captions: list[Tensor]
    is_mirrored: bool = False


@dataclass(frozen=True)
class CaptionBatch:
    """An image-major batch.

    Attributes:
        image_rows: (B,) rows of the split.
        feature_rows: (B,) rows of the feature store, which are those of the split unless views are cached.
        images: uint8 (B, 3, S, S), or None when features are cached.
        input_ids: (B·R, T), `<bos> a dog`, padded.
        labels: (B·R, T), `a dog <eos>`, `IGNORED_LABEL` where there is no word.
        lengths: (B·R,) labels of each row, for the host: asking the device would make it wait.
        num_tokens: Labels that count.
        num_captions: Captions that count.
        mirrored: (B,) bool, photos that are mirrored.
        weights: (B·R,) factors that multiply the loss of each caption; None = 1.
    """

    image_rows: Tensor
    feature_rows: Tensor
    images: Tensor | None
    input_ids: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    num_tokens: int
    num_captions: int
    mirrored: Tensor
    weights: Tensor | None = None

    def to(self, device: torch.device) -> CaptionBatch:
        """Copy the tensors to a device."""
        moved: dict[str, Any] = {n: v.to(device, non_blocking=True) for n, v in self._tensors()}
        return replace(self, **moved)

    def pin_memory(self) -> CaptionBatch:
        """Pin the tensors; torch's loader asks for it."""
        pinned: dict[str, Any] = {n: v.pin_memory() for n, v in self._tensors()}
        return replace(self, **pinned)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Tensor))


@dataclass(frozen=True)
class Views:
    """Random views of each training photo, encoded once and gone through epoch by epoch.

    Their feature store has `count` rows an image, those of an image side by side.

    Attributes:
        augmentation: Draws a view.
        count: How many views each image has.
        seed: The run's seed, from which all views are drawn.
    """

    augmentation: Augmentation
    count: int
    seed: int

    def row(self, image: int, epoch: int) -> int:
        """Return the row of the view that an epoch, counted from 0, shows of an image."""
        first = seed_of(self.seed, "first view", image)  # so that no epoch shows the first view of every image
        return image * self.count + (first + epoch) % self.count

    def seed_of_view(self, image: int, view: int) -> int:
        """Return the seed from which a view is drawn; every second view is mirrored if any is."""
        return seed_of(self.seed, "view", image, view) // 2 * 2 + (image + view) % 2


def build_views(recipe: Recipe) -> Views | None:
    """Return the views of training photos that a recipe caches, or None if it caches none."""
    augmentation, count = build_augmentation(recipe.data), recipe.encoder.cache_views
    return None if augmentation is None or count is None else Views(augmentation, count, recipe.run.seed)


class CaptionDataset(Dataset[Sample | Unreadable]):
    """Training samples by `SampleKey`. It has no state, so any worker of any run makes the same sample of a key.

    Args:
        photos: The split's `image` column with `decode=False`, or None when features are cached.
        captions: Gives the words of each image of the split.
        preprocessing: Decodes and resizes photos.
        augmentation: Changes photos at random; None = leaves them unchanged.
        captions_per_image: R, how many captions a sample has at most.
        seed: The run's seed; it decides the order of captions and the augmentation.
        views: Tells which view an epoch shows, if features of several views are cached.
        mirrored_words: Replaces words in the captions of mirrored photos; see `Vocabulary.mirrored_words`.
    """

    def __init__(
        self,
        photos: Sequence[Any] | None,
        captions: CaptionTable,
        preprocessing: Preprocessing,
        augmentation: Augmentation | None,
        captions_per_image: int,
        seed: int,
        views: Views | None = None,
        mirrored_words: Mapping[int, int] | None = None,
    ) -> None:
        self.photos = photos
        self.captions = captions
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.captions_per_image = captions_per_image
        self.seed = seed
        self.views = views
        self.mirrored_words = mirrored_words or {}

    def __getitem__(self, key: SampleKey) -> Sample | Unreadable:
        """Make a sample, or return the error of a photo that cannot be read."""
        try:
            pixels = self._pixels(key) if self.photos is not None else None
        except (DataError, OSError) as error:
            return error
        row = key.image if self.views is None else self.views.row(key.image, key.epoch)
        captions = [] if key.is_filler else self._captions(key)
        is_mirrored = self._is_mirrored(key, row)
        if is_mirrored:
            captions = [
                caption.clone().apply_(lambda word: self.mirrored_words.get(word, word)) for caption in captions
            ]
        return Sample(key.image, row, pixels, captions, is_mirrored)

    def _captions(self, key: SampleKey) -> list[Tensor]:
        captions = self.captions.captions(key.image)
        # One order of the captions an epoch, cut into parts: every caption is seen once.
        generator = torch.Generator().manual_seed(seed_of(self.seed, "captions", key.epoch, key.image))
        order = torch.randperm(len(captions), generator=generator).tolist()
        chosen = order[key.part * self.captions_per_image :][: self.captions_per_image]
        return [torch.from_numpy(captions[i]).long() for i in chosen]

    def _is_mirrored(self, key: SampleKey, row: int) -> bool:
        if self.views is not None:
            return self.views.augmentation.mirrors(self.views.seed_of_view(key.image, row % self.views.count))
        return self.augmentation is not None and self.augmentation.mirrors(self._augmentation_seed(key))

    def _augmentation_seed(self, key: SampleKey) -> int:
        return seed_of(self.seed, "augmentation", key.epoch, key.image, key.part)

    def _pixels(self, key: SampleKey) -> Tensor:
        assert self.photos is not None
        photo = self.photos[key.image]
        if self.augmentation is None:
            return self.preprocessing.load(photo)
        return _augmented(photo, self.preprocessing, self.augmentation, self._augmentation_seed(key))


def _augmented(photo: Any, preprocessing: Preprocessing, augmentation: Augmentation, seed: int) -> Tensor:
    return augmentation(to_tensor(open_photo(photo, preprocessing.image_size)), seed)


class Collator:
    """Joins samples into an image-major batch, padded to the longest caption.

    Args:
        captions_per_image: R; an image with fewer captions gets rows without labels.
    """

    def __init__(self, captions_per_image: int) -> None:
        self.captions_per_image = captions_per_image

    def __call__(self, samples: Sequence[Sample | Unreadable]) -> CaptionBatch | Unreadable:
        """Make a batch, or return the first error."""
        good: list[Sample] = []
        for sample in samples:
            if isinstance(sample, Unreadable):
                return sample
            good.append(sample)
        nothing = torch.zeros(0, dtype=torch.long)
        rows = [c for s in good for c in (*s.captions, *[nothing] * (self.captions_per_image - len(s.captions)))]
        labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED_LABEL)
        pixels = [s.pixels for s in good if s.pixels is not None]
        return CaptionBatch(
            image_rows=torch.tensor([s.image for s in good]),
            feature_rows=torch.tensor([s.feature_row for s in good]),
            images=torch.stack(pixels) if pixels else None,
            mirrored=torch.tensor([s.is_mirrored for s in good]),
            # A batch of fillers needs a column, too.
            **caption_rows(labels if labels.shape[1] else labels.new_full((len(rows), 1), IGNORED_LABEL)),
        )


def caption_rows(labels: Tensor) -> dict[str, Any]:
    """Return the fields of a `CaptionBatch` that follow from its labels (B·R, T)."""
    real = labels != IGNORED_LABEL
    lengths = tuple(real.sum(dim=1).tolist())
    read = nn.functional.pad(labels[:, :-1], (1, 0), value=Vocabulary.bos_id)
    return {
        "input_ids": read.masked_fill(~real, Vocabulary.pad_id),
        "labels": labels,
        "lengths": lengths,
        "num_tokens": sum(lengths),
        "num_captions": sum(length > 0 for length in lengths),
    }


class PhotoDataset(Dataset[tuple[int, Tensor] | Unreadable]):
    """Photos of a split by row, not augmented, or their views by row of the feature store.

    Args:
        photos: The split's `image` column with `decode=False`.
        preprocessing: Decodes and resizes photos.
        views: Draws random views; None = shows each photo once, unchanged.
    """

    def __init__(self, photos: Sequence[Any], preprocessing: Preprocessing, views: Views | None = None) -> None:
        self.photos = photos
        self.preprocessing = preprocessing
        self.views = views

    def __len__(self) -> int:
        return len(self.photos) * (1 if self.views is None else self.views.count)

    def __getitem__(self, row: int) -> tuple[int, Tensor] | Unreadable:
        """Return the row and its photo, uint8 (3, S, S), or the error of a broken photo."""
        try:
            return row, self._pixels(row)
        except (DataError, OSError) as error:
            return error

    def _pixels(self, row: int) -> Tensor:
        if self.views is None:
            return self.preprocessing.load(self.photos[row])
        image, view = divmod(row, self.views.count)
        seed = self.views.seed_of_view(image, view)
        return _augmented(self.photos[image], self.preprocessing, self.views.augmentation, seed)


def collate_photos(items: Sequence[tuple[int, Tensor] | Unreadable]) -> tuple[Tensor, Tensor] | Unreadable:
    """Return rows (B,) and photos uint8 (B, 3, S, S), or the first error."""
    for item in items:
        if isinstance(item, Unreadable):
            return item
    rows, photos = zip(*(item for item in items if not isinstance(item, Unreadable)), strict=True)
    return torch.tensor(rows), torch.stack(photos)
