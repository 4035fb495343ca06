"""The source `folder`: your own photos with a `metadata.jsonl` or `metadata.csv`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from capdist.data.sources.columns import caption_columns, caption_texts, find_column, optional_column
from capdist.data.sources.findings import NO_CAPTION, UNKNOWN_SPLIT, Findings
from capdist.data.sources.photos import PhotoFolder, existing_folder
from capdist.data.sources.records import SPLITS, Record, Request, split_by_hash, split_named, to_splits
from capdist.data.sources.text_files import clean_caption, read_csv, read_lines
from capdist.errors import DataError

if TYPE_CHECKING:
    from datasets import DatasetDict

_LAYOUT = (
    "photos with a metadata.jsonl or metadata.csv (file_name, captions, perhaps split), "
    "or folders train/, validation/, test/ with one each"
)
_METADATA = ("metadata.jsonl", "metadata.csv")
_FILE_NAMES = ("file_name", "filename", "image", "file")
_HELD_OUT = 0.1


@dataclass
class _Entry:
    """What the metadata says about one photo."""

    place: str
    path: str | None
    split: str | None  # as written, None where nothing is
    captions: list[str] = field(default_factory=list)


def load(request: Request, findings: Findings) -> DatasetDict:
    """Read the folder `request.path`; see `load_source`."""
    root = existing_folder(request.path, _LAYOUT)
    metadata = _Metadata(request, findings)
    for split, folder in _parts(root):
        metadata.read(folder, split, prefix="" if folder == root else f"{folder.name}/")
    entries = metadata.entries
    names = [name for name, entry in entries.items() if entry.path and _has_captions(name, entry, findings)]
    splits = _given_splits(names, entries, findings)
    if splits is None:
        splits = split_by_hash(names, _HELD_OUT)
        counts = ", ".join(f"{len(splits.get(split, [])):,} {split}" for split in SPLITS)
        findings.remark(f"no split is given, so photos were divided by the hash of their names: {counts}")
    records = {
        split: [Record(name, entries[name].captions, entries[name].path) for name in part]
        for split, part in splits.items()
    }
    return to_splits(records, request.limit)


def _parts(root: Path) -> list[tuple[str | None, Path]]:
    """Return the folders that have metadata: the root (split None), or one of each split."""
    if _metadata_file(root):
        return [(None, root)]
    children = sorted(path for path in root.iterdir() if path.is_dir() and split_named(path.name))
    parts: list[tuple[str | None, Path]] = [(path.name, path) for path in children if _metadata_file(path)]
    if not parts:
        raise DataError(f"{root}: no metadata.jsonl or metadata.csv; expected {_LAYOUT}")
    return parts


def _metadata_file(folder: Path) -> Path | None:
    files = [folder / name for name in _METADATA if (folder / name).is_file()]
    if len(files) > 1:
        raise DataError(f"{folder}: both metadata.jsonl and metadata.csv; keep one of them")
    return files[0] if files else None


class _Metadata:
    """Reads metadata files into `entries`, by the names of the photos below the root."""

    def __init__(self, request: Request, findings: Findings) -> None:
        self.entries: dict[str, _Entry] = {}
        self._request = request
        self._findings = findings

    def read(self, folder: Path, split: str | None, prefix: str) -> None:
        """Read the metadata file of `folder`, whose photos are called `prefix` and their file name."""
        file = _metadata_file(folder)
        assert file is not None
        photos = PhotoFolder(folder, self._findings)
        rows = read_csv(file, self._findings) if file.suffix == ".csv" else _read_jsonl(file, self._findings)
        for place, row in rows:
            self._read_row(place, dict(row), split, photos, prefix)
        for name in photos.names():
            if f"{prefix}{name}" not in self.entries:
                self._findings.oddity(NO_CAPTION, f"{prefix}{name}")

    def _read_row(
        self, place: str, row: dict[str, object], split: str | None, photos: PhotoFolder, prefix: str
    ) -> None:
        columns, asked = list(row), self._request
        name = row[find_column(columns, asked.image_column, _FILE_NAMES, "data.image_column", place)]
        cells = [row[column] for column in caption_columns(columns, asked.captions_column, place)]
        texts = [caption_texts(cell) for cell in cells]
        if not isinstance(name, str) or None in texts:
            self._findings.mistake("the file name must be text, captions a text or a list of texts", place)
            return
        if split is None:
            column = optional_column(columns, asked.split_column, ("split",), "data.split_column", place)
            split = _split_word(row[column]) if column else None
        entry = self.entries.get(f"{prefix}{name}")
        if entry is None:
            entry = self.entries[f"{prefix}{name}"] = _Entry(place, photos.find(name, place), split)
        else:
            self._check_repeated(entry, place, split, one_caption=len(cells) == 1 and isinstance(cells[0], str))
        cleaned = (clean_caption(text, place, self._findings) for part in texts for text in part or [])
        entry.captions += [caption for caption in cleaned if caption]

    def _check_repeated(self, entry: _Entry, place: str, split: str | None, *, one_caption: bool) -> None:
        """Accept several rows of one photo if each has one caption and all name the same split."""
        if not one_caption:
            self._findings.mistake("the photo has a row already; give all its captions in one", place)
        elif entry.split != split:
            self._findings.mistake(f"the photo is in another split at {entry.place}; it belongs to one", place)


def _split_word(cell: object) -> str | None:
    """Return the split that a cell names, spelt as there; null and an empty cell name none."""
    return None if cell is None else str(cell).strip() or None


def _read_jsonl(file: Path, findings: Findings) -> Iterator[tuple[str, dict[str, object]]]:
    for place, line in read_lines(file):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield place, row
        else:
            findings.mistake('expected one JSON object, such as {"file_name": "a.jpg", "captions": ["a dog"]}', place)


def _has_captions(name: str, entry: _Entry, findings: Findings) -> bool:
    if not entry.captions:
        findings.oddity(NO_CAPTION, name)
    return bool(entry.captions)


def _given_splits(names: list[str], entries: dict[str, _Entry], findings: Findings) -> dict[str, list[str]] | None:
    """Return the photos of each split that the metadata names, None if it names none."""
    if all(entries[name].split is None for name in names):
        return None
    splits: dict[str, list[str]] = {}
    for name in names:
        word = entries[name].split
        split = split_named(word or "")
        if split is None:
            findings.oddity(UNKNOWN_SPLIT, f"{name} ({word or 'none'})")
        else:
            splits.setdefault(split, []).append(name)
    return splits
