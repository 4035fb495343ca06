"""A source made ready for a run: splits, vocabulary, captions as ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capdist.config import DataSection, TextSection
from capdist.data.captions import CaptionTable, tokenize_images
from capdist.data.sources import load_source
from capdist.errors import DataError
from capdist.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from capdist.data.sources import LoadedData

SPLIT_ALIASES = {"dev": "validation", "val": "validation", "valid": "validation"}


@dataclass(frozen=True)
class Split:
    """Photos and references of one split, row by row.

    Attributes:
        name: `train`, `validation` or `test`.
        image_ids: Id of each image.
        photos: `path` and/or `bytes` of each image.
        references: Raw captions of each image.
    """

    name: str
    image_ids: Sequence[str]
    photos: Sequence[Mapping[str, Any]]
    references: Sequence[Sequence[str]]

    @property
    def scored_rows(self) -> list[int]:
        """Rows of images that have at least one caption to compare with."""
        return [row for row, captions in enumerate(self.references) if len(captions)]

    @property
    def digest(self) -> str:
        """SHA-256 of ids and captions in their order."""
        digest = hashlib.sha256()
        for image_id, captions in zip(self.image_ids, self.references, strict=True):
            digest.update("\0".join((image_id, *captions)).encode() + b"\1")
        return digest.hexdigest()


@dataclass(frozen=True)
class PreparedData:
    """What a run trains on.

    Attributes:
        splits: By name; a source may lack `validation` or `test`.
        vocabulary: Counted on the training split only.
        captions: Of the training split.
        notes: Oddities of the source, counted, in plain words.
    """

    splits: Mapping[str, Split]
    vocabulary: Vocabulary
    captions: CaptionTable
    notes: tuple[str, ...]


def read_source(data: DataSection) -> LoadedData:
    """Load the source that a recipe names.

    Raises:
        DataError, UsageError, StorageError: as `load_source`.
    """
    return load_source(
        data.source,
        data.path,
        image_column=data.image_column,
        captions_column=data.captions_column,
        id_column=data.id_column,
        split_column=data.split_column,
        limit=data.limit,
    )


def get_split(loaded: LoadedData, name: str) -> Split:
    """Return a split; `dev` and `val` are names of `validation`.

    Raises:
        DataError: if the source has no such split.
    """
    name = SPLIT_ALIASES.get(name, name)
    if name not in loaded.splits:
        raise DataError(f"data: the source has no split {name!r}; it has {', '.join(loaded.splits)}")
    rows = loaded.splits[name]
    return Split(name, list(rows["image_id"]), rows.select_columns("image")["image"], list(rows["captions"]))


def prepare(data: DataSection, text: TextSection) -> PreparedData:
    """Load a source, count its words and encode its captions.

    Raises:
        DataError: if there is nothing to train on, and as `read_source`.
    """
    loaded = read_source(data)
    if "train" not in loaded.splits:
        raise DataError(f"data: the source has no training split; it has {', '.join(loaded.splits)}")
    splits = {name: get_split(loaded, name) for name in loaded.splits}
    words = tokenize_images(splits["train"].references)
    vocabulary = Vocabulary.count((caption for captions in words for caption in captions), text.min_frequency)
    captions = CaptionTable.build(words, vocabulary, text.max_length)
    return PreparedData(splits, vocabulary, captions, (*loaded.notes, *_caption_notes(captions, text)))


def _caption_notes(captions: CaptionTable, text: TextSection) -> list[str]:
    notes = []
    if captions.num_cut:
        notes.append(f"{captions.num_cut} training captions have more than {text.max_length} words and are cut there")
    if captions.num_empty:
        notes.append(f"{captions.num_empty} training captions have no word and are left out")
    return notes
