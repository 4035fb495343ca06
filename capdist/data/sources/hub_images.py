"""The image column of a hub data set, brought to `{"path", "bytes"}` without reading or copying the images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdist.data.sources.columns import find_column
from capdist.data.sources.findings import Findings
from capdist.data.sources.photos import PhotoFolder

if TYPE_CHECKING:
    from datasets import Dataset

_IMAGE_NAMES = ("image", "img", "photo", "picture", "image_path", "file_name", "filename")


def image_column_of(table: Dataset, asked: str | None, where: str) -> str:
    """Return the column that was asked for, else the only one of type image, else one of a usual name."""
    from datasets import Image

    typed = [name for name, kind in table.features.items() if isinstance(kind, Image)]
    if not asked and len(typed) == 1:
        return typed[0]
    return find_column(table.column_names, asked, _IMAGE_NAMES, "data.image_column", where)


def image_rows(table: Dataset, column: str, folder: Path | None, where: str, findings: Findings) -> Dataset:
    """Return a table of one column `image`, `{"path", "bytes"}`, row for row that of `table`.

    Args:
        table: Rows as the data set has them.
        column: The column of images: embedded, raw bytes, or names of files below `folder`.
        folder: The local folder of the data set, None for one of the hub.
        where: Data set and split, for findings.
        findings: Takes rows without an image and paths that lead elsewhere; both are mistakes.
    """
    from datasets import Dataset, Features, Image, Value

    if table.features[column] == Value("string"):
        names = table.select_columns(column)[:][column]
        cells = [{"path": path, "bytes": None} for path in _files(names, folder, where, findings)]
        return Dataset.from_dict({"image": cells}, features=Features({"image": Image(decode=False)}))
    images = table.select_columns(column).rename_column(column, "image").cast_column("image", Image(decode=False))
    _check_cells(images, folder, where, findings)
    return images


def _files(names: Sequence[str | None], folder: Path | None, where: str, findings: Findings) -> list[str | None]:
    if folder is None:
        findings.mistake("the images are names of files; only a local folder can hold those", where)
        return [None] * len(names)
    photos = PhotoFolder(folder.absolute(), findings)
    return [photos.find(str(name), f"{where}, row {row}") for row, name in enumerate(names)]


def _check_cells(images: Dataset, folder: Path | None, where: str, findings: Findings) -> None:
    """Refuse rows without an image, and paths that a stranger wrote into the data and that lead elsewhere."""
    import pyarrow.compute as pc

    row = 0
    for chunk in images.data.column("image").chunks:
        embedded: list[bool] = pc.is_valid(chunk.field("bytes")).to_pylist()
        paths: list[Any] = chunk.field("path").to_pylist()
        for has_bytes, path in zip(embedded, paths, strict=True):
            if not has_bytes and not path:
                findings.mistake("the row has no image", f"{where}, row {row}")
            elif not has_bytes and not _is_inside(path, folder):
                findings.mistake(f"the image is a file outside the data set: {path!r}", f"{where}, row {row}")
            row += 1


def _is_inside(path: str, folder: Path | None) -> bool:
    """The library itself unpacks images into its caches; those and the data set's own folder are fine."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    roots = [HF_HUB_CACHE, str(config.HF_DATASETS_CACHE), *([str(folder)] if folder else [])]
    real = os.path.realpath(path)
    return any(real.startswith(os.path.realpath(root) + os.sep) for root in roots)
