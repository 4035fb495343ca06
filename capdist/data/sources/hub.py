"""The source `hub`: a data set of the Hugging Face hub, or a local `save_to_disk` or parquet folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdist.data.sources.columns import caption_columns, caption_texts, find_column, optional_column
from capdist.data.sources.findings import NO_CAPTION, UNKNOWN_SPLIT, Findings
from capdist.data.sources.hub_images import image_column_of, image_rows
from capdist.data.sources.hub_open import open_splits
from capdist.data.sources.records import SPLITS, Request, split_named
from capdist.data.sources.text_files import clean_caption

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_ID_NAMES = ("image_id", "imgid", "img_id", "filename", "file_name", "image_filename", "image_name")


@dataclass
class _Image:
    """One image: its first row in the table, and what all its rows say."""

    row: int
    split: str
    image_id: str
    captions: list[str] = field(default_factory=list)


def load(request: Request, findings: Findings) -> DatasetDict:
    """Read the data set `request.path`; see `load_source`."""
    from datasets import DatasetDict, concatenate_datasets

    local = Path(request.path).expanduser()
    tables = open_splits(request.path)
    by_column = request.split_column or _implied_split_column(tables, findings)
    parts: dict[str, list[Dataset]] = {}
    first_split: dict[str, str] = {}
    for name, table in tables.items():
        reader = _Table(f"{request.path}, split {name}", name, table, request, findings)
        folder = local if local.is_dir() else None
        rows, unusable = image_rows(table, reader.image_column, folder, reader.where, findings)
        images = [image for image in reader.images(by_column) if image.row not in unusable]
        for split, members in _by_split(images, first_split, reader.where, findings).items():
            parts.setdefault(split, []).append(_assemble(rows, members))
    findings.raise_mistakes()
    whole = {split: concatenate_datasets(parts[split]) for split in SPLITS if split in parts}
    return DatasetDict({split: _first(part, request.limit) for split, part in whole.items()})


def _implied_split_column(tables: DatasetDict, findings: Findings) -> str | None:
    """Return the column that names the real split, which a data set of a single split may have."""
    if len(tables) != 1 or "split" not in next(iter(tables.values())).column_names:
        return None
    findings.remark("the data set comes in one piece, so its column 'split' divides it")
    return "split"


class _Table:
    """One split of the data set, under its own name.

    Args:
        where: Names data set and split in errors.
        name: What the data set calls the split.
        table: Holds the rows of the split.
        request: The columns that were asked for.
        findings: Takes rows that cannot be used.
    """

    def __init__(self, where: str, name: str, table: Dataset, request: Request, findings: Findings) -> None:
        self.where = where
        self._name = name
        self._table = table
        self._request = request
        self._findings = findings
        columns: list[str] = table.column_names
        self.image_column = image_column_of(table, request.image_column, where)
        others = [column for column in columns if column != self.image_column]
        self._caption_columns = caption_columns(others, request.captions_column, where)
        self._id_column = optional_column(columns, request.id_column, _ID_NAMES, "data.id_column", where)

    def images(self, split_column: str | None) -> Iterator[_Image]:
        """Yield the images with their cleaned captions; rows of the same id are put together."""
        images: dict[str, _Image] = {}
        words = self._splits(split_column)
        for row, (key, texts) in enumerate(zip(self._keys(), self._captions(), strict=True)):
            place = f"{self.where}, row {row}"
            split = split_named(words[row])
            if split is None:
                self._findings.oddity(UNKNOWN_SPLIT, f"{key} ({words[row] or 'none'})")
                continue
            image = images.setdefault(key, _Image(row, split, key))
            if image.row != row and not self._one_caption_a_row:
                self._findings.mistake(f"the image is in row {image.row} too; choose another data.id_column", place)
            if image.split != split:
                self._findings.mistake(f"the image is in {image.split} too; an image belongs to one split", place)
            cleaned = (clean_caption(text, place, self._findings) for text in texts)
            image.captions += [caption for caption in cleaned if caption]
        for image in images.values():
            if image.captions:
                yield image
            else:
                self._findings.oddity(NO_CAPTION, image.image_id)

    @property
    def _one_caption_a_row(self) -> bool:
        from datasets import Value

        kinds = [self._table.features[column] for column in self._caption_columns]
        return len(kinds) == 1 and isinstance(kinds[0], Value)

    def _splits(self, column: str | None) -> list[str]:
        if column is None:
            return [self._name] * len(self._table)
        found = find_column(self._table.column_names, column, (), "data.split_column", self.where)
        return ["" if word is None else str(word) for word in self._table.select_columns(found)[:][found]]

    def _captions(self) -> Iterator[list[str]]:
        cells: dict[str, list[Any]] = self._table.select_columns(self._caption_columns)[:]
        for row, values in enumerate(zip(*cells.values(), strict=True)):
            texts = [caption_texts(value) for value in values]
            if None in texts:
                kind = "captions must be text or a list of texts; choose data.captions_column"
                self._findings.mistake(kind, f"{self.where}, row {row}")
            yield [text for part in texts for text in part or []]

    def _keys(self) -> Iterator[str]:
        """Yield a key for each row; rows with equal keys show the same image. It is the id, or else the bytes."""
        if self._id_column:
            for row, value in enumerate(self._table.select_columns(self._id_column)[:][self._id_column]):
                if value is None:
                    self._findings.mistake(f"the row has no {self._id_column}", f"{self.where}, row {row}")
                yield str(value)
        elif self._one_caption_a_row:
            yield from map(_digest, _cells(self._table, self.image_column))
        else:
            yield from (f"{self._name}_{row:06d}" for row in range(len(self._table)))


def _cells(table: Dataset, column: str) -> Iterator[Any]:
    """Yield raw cells a few at a time: images of a whole split do not fit into memory."""
    for batch in table.select_columns(column).with_format("arrow").iter(64):
        yield from batch[column].to_pylist()


def _digest(cell: Any) -> str:
    content = cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell
    raw = content if isinstance(content, bytes) else str(content).encode(errors="surrogatepass")
    return hashlib.sha256(raw).hexdigest()[:16]


def _by_split(
    images: list[_Image], first_split: dict[str, str], where: str, findings: Findings
) -> dict[str, list[_Image]]:
    splits: dict[str, list[_Image]] = {}
    for image in images:
        before = first_split.setdefault(image.image_id, where)
        if before != where:
            findings.mistake(
                f"the image is in {before} too; an image belongs to one split", f"{where}: {image.image_id}"
            )
        splits.setdefault(image.split, []).append(image)
    return splits


def _assemble(rows: Dataset, images: list[_Image]) -> Dataset:
    """Put ids and captions beside the images, which stay where they are, on disk or in memory."""
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    words = Dataset.from_dict(
        {"image_id": [image.image_id for image in images], "captions": [image.captions for image in images]},
        features=Features({"image_id": Value("string"), "captions": List(Value("string"))}),
    )
    chosen = rows.select([image.row for image in images])
    return concatenate_datasets([words, chosen], axis=1).select_columns(["image_id", "image", "captions"])


def _first(part: Dataset, limit: int | None) -> Dataset:
    return part if limit is None else part.select(range(min(limit, len(part))))
