"""The image column of a hub data set, brought to `{"path", "bytes"}` without reading or copying the images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


def image_rows(
    table: Dataset, column: str, folder: Path | None, where: str, findings: Findings
) -> tuple[Dataset, set[int]]:
    """Return the images of `table` row by row, as one column `image` of `{"path", "bytes"}`, and rows to leave out.

    Args:
        table: Rows that the data set holds.
        column: The column of images: embedded, raw bytes, or names of files below `folder`.
        folder: Local folder that holds the data set; None for one of the hub.
        where: Names data set and split in findings.
        findings: Takes missing files as oddities, and the row is left out. Rows without an image and paths that lead
            elsewhere are mistakes.
    """
    from datasets import Dataset, Features, Image, Value

    if table.features[column] == Value("string"):
        paths = _files(table.select_columns(column)[:][column], folder, where, findings)
        cells = [path and {"path": path, "bytes": None} for path in paths]
        files = Dataset.from_dict({"image": cells}, features=Features({"image": Image(decode=False)}))
        return files, {row for row, path in enumerate(paths) if path is None}
    images = table.select_columns(column).rename_columns({column: "image"}).cast_column("image", Image(decode=False))
    _check_cells(images, folder, where, findings)
    return images, set()


def _files(names: Sequence[str | None], folder: Path | None, where: str, findings: Findings) -> list[str | None]:
    if folder is None:
        findings.mistake("the images are names of files; only a local folder can hold those", where)
        return [None] * len(names)
    photos = PhotoFolder(folder.absolute(), findings)
    first_rows = {name: row for row, name in reversed(list(enumerate(names)))}
    paths = {name: photos.find(name or "", f"{where}, row {row}") for name, row in first_rows.items()}
    return [paths[name] for name in names]


def _check_cells(images: Dataset, folder: Path | None, where: str, findings: Findings) -> None:
    """Refuse rows without an image, and paths in the data that lead outside the allowed folders."""
    roots = tuple(_allowed_roots(folder))
    first = 0
    for chunk in images.data.column("image").chunks:
        fields = dict(zip((field.name for field in chunk.type), chunk.flatten(), strict=True))
        embedded: list[bool] = fields["bytes"].is_valid().to_pylist()  # looks at no byte of the images
        paths: list[str | None] = fields["path"].to_pylist()
        for row, (has_bytes, path) in enumerate(zip(embedded, paths, strict=True), start=first):
            if not has_bytes and not path:
                findings.mistake("the row has no image", f"{where}, row {row}")
            elif not has_bytes and path and not os.path.realpath(path).startswith(roots):
                findings.mistake("the image is a file outside the data set", f"{where}, row {row}: {path!r}")
        first += len(chunk)


def _allowed_roots(folder: Path | None) -> list[str]:
    """Return the folders that paths may lead to: the caches of the library, and the data set's own folder."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    roots = [HF_HUB_CACHE, str(config.HF_DATASETS_CACHE), *([str(folder)] if folder else [])]
    return [os.path.realpath(root) + os.sep for root in roots]
