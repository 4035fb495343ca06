"""Captions as ids, in three flat arrays: small, and quick to hand to workers for any number of captions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capdist.text.tokenizer import tokenize
from capdist.text.vocabulary import Vocabulary


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed that is a function of the parts alone, and different for different parts."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class CaptionTable:
    """The captions of a split as ids.

    Attributes:
        ids: Words of all captions, one after the other; a caption that was not cut ends with `<eos>`.
        caption_starts: Where each caption starts in `ids`, and a last entry.
        image_starts: Where each image's captions start in `caption_starts`, and a last entry.
        num_cut: Number of captions that were too long. They are cut and get no `<eos>`, so the model does not learn to
            stop there.
        num_empty: Number of captions without any word; they are left out.
    """

    ids: NDArray[np.int32]
    caption_starts: NDArray[np.int64]
    image_starts: NDArray[np.int64]
    num_cut: int
    num_empty: int

    @classmethod
    def build(cls, images: Sequence[Sequence[Sequence[str]]], vocabulary: Vocabulary, max_length: int) -> CaptionTable:
        """Encode tokenised captions.

        Args:
            images: For each image its captions, each a list of words as `tokenize_images` gives them.
            vocabulary: Gives the ids.
            max_length: Cuts captions that have more words.
        """
        ids: list[int] = []
        caption_starts, image_starts = [0], [0]
        num_cut = num_empty = 0
        for captions in images:
            for words in captions:
                if not words:
                    num_empty += 1
                    continue
                ids += vocabulary.encode(words[:max_length])
                if len(words) > max_length:
                    num_cut += 1
                else:
                    ids.append(vocabulary.eos_id)
                caption_starts.append(len(ids))
            image_starts.append(len(caption_starts) - 1)
        return cls(
            np.asarray(ids, dtype=np.int32),
            np.asarray(caption_starts, dtype=np.int64),
            np.asarray(image_starts, dtype=np.int64),
            num_cut,
            num_empty,
        )

    @property
    def num_images(self) -> int:
        """Images, with or without captions."""
        return len(self.image_starts) - 1

    @property
    def captions_of_images(self) -> NDArray[np.int64]:
        """Captions of each image."""
        return np.diff(self.image_starts)

    def captions(self, image: int) -> list[NDArray[np.int32]]:
        """Return the captions of an image."""
        first, last = self.image_starts[image], self.image_starts[image + 1]
        bounds = self.caption_starts[first : last + 1]
        return [self.ids[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]


def reference_ids(images: Sequence[Sequence[Sequence[str]]], vocabulary: Vocabulary) -> list[list[NDArray[np.int64]]]:
    """Return whole captions by image as ids that end with `<eos>`. Each word outside the vocabulary has its own id.

    Captions without a word are left out. No sampled word ever equals one outside the vocabulary, as in a score that
    compares the words themselves.
    """
    ids = {word: index for index, word in enumerate(vocabulary.words)}

    def encode(caption: Sequence[str]) -> NDArray[np.int64]:
        return np.array([*(ids.setdefault(word, len(ids)) for word in caption), vocabulary.eos_id])

    return [[encode(caption) for caption in captions if caption] for captions in images]


def tokenize_images(images: Iterable[Sequence[str]]) -> list[list[list[str]]]:
    """Tokenise the raw captions of all images in one call."""
    images = list(images)
    words = iter(tokenize(caption for captions in images for caption in captions))
    return [[next(words) for _ in captions] for captions in images]
