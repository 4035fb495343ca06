"""A source made ready for a run: splits, vocabulary, captions as ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capdist.data.captions import CaptionTable, tokenize_images
from capdist.data.sources import load_source
from capdist.data.sources.records import SPLIT_WORDS
from capdist.errors import DataError
from capdist.recipe.sections import DataSection, Recipe, TextSection
from capdist.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from capdist.data.sources import LoadedData

CHOOSE, REPORT = "validation-choose", "validation-report"
"""Halves of the validation split: one chooses a model and its search, the other is held out for the report."""

SPLIT_ALIASES = {**SPLIT_WORDS, "dev-choose": CHOOSE, "dev-report": REPORT}
"""Names that `get_split` takes for splits and the halves of `validation`."""


@dataclass(frozen=True)
class Split:
    """Photos and references of one split, row by row.

    Attributes:
        name: `train`, `validation`, `test`, or a half of `validation`.
        image_ids: Name the image of each row.
        photos: Have `path` and/or `bytes` of each image.
        references: The captions of each image, as people wrote them.
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
        captions: Captions of the training split, encoded with the vocabulary.
        notes: Oddities of the source, counted, in plain words.
    """

    splits: Mapping[str, Split]
    vocabulary: Vocabulary
    captions: CaptionTable
    notes: tuple[str, ...]

    @property
    def choosing(self) -> Split | None:
        """The split on which the best model is chosen, if there is one."""
        return self.splits.get(CHOOSE) or self.splits.get("validation")

    @property
    def reporting(self) -> Split | None:
        """The split of the final scores, if there is one: a held-out one, else `validation`."""
        return next((self.splits[n] for n in ("test", REPORT, "validation") if n in self.splits), None)


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
    """Return a split by its name or by an alias, such as `dev-choose` for a half of `validation`; see `SPLIT_ALIASES`.

    The halves take turns with the images in the order of the SHA-256 of their ids, so they are the same everywhere.
    With `data.limit` they divide the images that are left.

    Raises:
        DataError: if the source has no such split.
    """
    name = SPLIT_ALIASES.get(name, name)
    whole = "validation" if name in (CHOOSE, REPORT) else name
    if whole not in loaded.splits:
        raise DataError(f"data: the source has no split {whole!r}; it has {', '.join(loaded.splits)}")
    rows = loaded.splits[whole]
    if whole != name:
        digests = [hashlib.sha256(image_id.encode()).digest() for image_id in rows["image_id"]]
        in_order = sorted(range(len(digests)), key=digests.__getitem__)
        rows = rows.select(sorted(in_order[name == REPORT :: 2]))
    return Split(name, list(rows["image_id"]), rows.select_columns("image")["image"], list(rows["captions"]))


def get_splits(loaded: LoadedData, halve_validation: bool) -> dict[str, Split]:
    """Return all splits of a source by name. If asked to, halve a `validation` of two images or more."""
    names = list(loaded.splits)
    if halve_validation and len(loaded.splits.get("validation", ())) > 1:
        where = names.index("validation")
        names[where : where + 1] = [CHOOSE, REPORT]
    return {name: get_split(loaded, name) for name in names}


def prepare(recipe: Recipe) -> PreparedData:
    """Load the source of a recipe, count its words and encode its captions.

    Raises:
        DataError: if there is nothing to train on, and as `read_source`.
    """
    loaded, text = read_source(recipe.data), recipe.text
    if "train" not in loaded.splits:
        raise DataError(f"data: the source has no training split; it has {', '.join(loaded.splits)}")
    splits = get_splits(loaded, recipe.evaluation.halve_validation)
    words = tokenize_images(splits["train"].references)
    vocabulary = Vocabulary.count((caption for captions in words for caption in captions), text.min_frequency)
    captions = CaptionTable.build(words, vocabulary, text.max_length)
    notes = (*map(str, loaded.notes), *_caption_notes(captions, text))
    return PreparedData(splits, vocabulary, captions, notes)


def _caption_notes(captions: CaptionTable, text: TextSection) -> list[str]:
    notes = []
    if captions.num_cut:
        notes.append(f"{captions.num_cut} training captions have more than {text.max_length} words and are cut there")
    if captions.num_empty:
        notes.append(f"{captions.num_empty} training captions have no word and are left out")
    return notes
