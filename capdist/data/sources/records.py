"""The one schema: what a source is asked for, what it yields, and how that becomes a `datasets.DatasetDict`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capdist.data.sources.findings import Note

if TYPE_CHECKING:
    from datasets import DatasetDict, Features

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What people call the splits, in lower case."""


@dataclass(frozen=True)
class LoadedData:
    """Captioned photos as read from a source.

    Attributes:
        splits: A `datasets.DatasetDict` with columns `image_id`, `image` (`{"path", "bytes"}`) and `captions`.
        notes: What was odd about the data, counted.
    """

    splits: DatasetDict
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Request:
    """The arguments of `load_source`, without the name of the source."""

    path: str
    image_column: str | None = None
    captions_column: str | None = None
    id_column: str | None = None
    split_column: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Record:
    """One image: the path or the bytes of its file, and at least one caption."""

    image_id: str
    captions: Sequence[str]
    path: str | None = None
    content: bytes | None = None


def features() -> Features:
    """Return the columns that every source gives. Images are not decoded; the loader's workers do that."""
    from datasets import Features, Image, List, Value

    return Features({"image_id": Value("string"), "image": Image(decode=False), "captions": List(Value("string"))})


def to_splits(records: Mapping[str, Sequence[Record]], limit: int | None) -> DatasetDict:
    """Put records into in-memory tables.

    Args:
        records: The records of each split; a split without records is left out.
        limit: Keeps only this many records of each split, the first ones; None = all.
    """
    from datasets import Dataset, DatasetDict

    columns = features()
    return DatasetDict(
        {
            split: Dataset.from_dict(_columns(records[split][:limit]), features=columns)
            for split in SPLITS
            if records.get(split)
        }
    )


def _columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    return {
        "image_id": [record.image_id for record in records],
        "image": [{"path": record.path, "bytes": record.content} for record in records],
        "captions": [list(record.captions) for record in records],
    }


def split_named(word: str) -> str | None:
    """Return the split that a word such as `dev` or `Valid` means, None for one we do not know."""
    return SPLIT_WORDS.get(word.strip().lower())


def split_by_hash(image_ids: Iterable[str], held_out: float) -> dict[str, list[str]]:
    """Divide images by the SHA-256 of their names, the same on every machine and for every order of the files.

    Args:
        image_ids: The names; at least three, or all go to `train`.
        held_out: Share of the images in `validation`, and again in `test`; each gets at least one.

    Returns:
        The names of each split, in the order of their hashes.
    """
    # The salt must never change: another one would put training photos of older models into the test split.
    ordered = sorted(image_ids, key=lambda name: hashlib.sha256(f"0:{name}".encode()).digest())
    if len(ordered) < 3:
        return {"train": ordered}
    size = max(1, round(len(ordered) * held_out))
    return {"validation": ordered[:size], "test": ordered[size : 2 * size], "train": ordered[2 * size :]}
