"""Finds the columns of the image, the captions and the split by their names, unless the user names them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from capdist.errors import DataError

CAPTION_NAMES = ("captions", "caption", "caption_*", "text", "texts", "sentences", "sentence", "raw")


def find_column(columns: Sequence[str], asked: str | None, usual: Sequence[str], key: str, where: str) -> str:
    """Return the column that was asked for, else the first of the usual names that is there.

    Args:
        columns: The names that are there.
        asked: Column that the user chose; None = look for a usual one.
        usual: Names to look for without one.
        key: The recipe key that makes the choice, e.g. `data.image_column`.
        where: Names the file or data set in the error.

    Raises:
        DataError: There is no such column; lists those that are there.
    """
    found = optional_column(columns, asked, usual, key, where)
    if found is None:
        raise DataError(
            f"{where}: none of the columns {', '.join(columns)} is called {' or '.join(usual)}; "
            f"name the right one with {key}"
        )
    return found


def optional_column(
    columns: Sequence[str], asked: str | None, usual: Sequence[str], key: str, where: str
) -> str | None:
    """Return the column that `find_column` finds, or None if nobody asked for one and no usual name is there."""
    if asked and asked not in columns:
        raise DataError(f"{where}: {key} is '{asked}', but the columns are {', '.join(columns)}")
    return asked or next((name for name in usual if name in columns), None)


def caption_columns(columns: Sequence[str], asked: str | None, where: str) -> list[str]:
    """Return the columns that hold captions, `caption_2` before `caption_10`.

    Args:
        columns: The names that are there.
        asked: Column that the user chose, or a pattern such as `caption_*`.
        where: Names the file or data set in the error.

    Raises:
        DataError: There is none; lists the columns that are there.
    """
    for pattern in (asked,) if asked else CAPTION_NAMES:
        if found := [name for name in columns if fnmatchcase(name, pattern)]:
            return sorted(found, key=_natural)
    sought = f"data.captions_column is '{asked}'" if asked else f"none is called {' or '.join(CAPTION_NAMES)}"
    raise DataError(f"{where}: no captions in the columns {', '.join(columns)}; {sought}; set data.captions_column")


def caption_texts(value: object) -> list[str] | None:
    """Return the captions in a cell: a text, a list of texts, a list of `{"raw": text}`; None for anything else."""
    if value is None:
        return []
    cells = value if isinstance(value, list) else [value]
    texts = [cell.get("raw") if isinstance(cell, dict) else cell for cell in cells]
    return [text for text in texts if isinstance(text, str)] if all(isinstance(t, str) for t in texts) else None


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]
