"""Sources of captioned photos: each is read into the same schema, which everything else relies on.

`load_source` gives a `datasets.DatasetDict` whose splits (`train`, `validation`, `test`, those that exist) have
the columns `image_id: string, image: Image, captions: List(string)`, one row an image. Images are kept as
`{"path", "bytes"}` and not decoded. Captions are Unicode NFC on one line with single spaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from capdist.data.sources import flickr8k, folder, hub, karpathy, scenes
from capdist.data.sources.findings import Findings
from capdist.data.sources.records import LoadedData, Request
from capdist.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = ["SOURCES", "LoadedData", "load_source"]

SOURCES: dict[str, Callable[[Request, Findings], DatasetDict]] = {
    "scenes": scenes.load,
    "flickr8k": flickr8k.load,
    "karpathy": karpathy.load,
    "hub": hub.load,
    "folder": folder.load,
}
_WITH_COLUMNS = ("hub", "folder")


def load_source(
    source: str,
    path: str | None = None,
    *,
    image_column: str | None = None,
    captions_column: str | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    limit: int | None = None,
) -> LoadedData:
    """Read the captioned photos of a source.

    Args:
        source: A key of `SOURCES`.
        path: The folder, file or data set id of the source; `scenes` has none.
        image_column: Column that holds the image or its file name (`hub`, `folder`); found by its name if None.
        captions_column: Column of captions: a list, one caption a row, or a pattern such as `caption_*`.
        id_column: Column that names the image; rows of the same name describe the same image.
        split_column: Column that names the split of a row.
        limit: Keeps only this many images of each split, the first ones; None = all.

    Returns:
        The splits, and notes on what was odd about the data.

    Raises:
        UsageError: The source is unknown, or a setting that it has no use for was given.
        DataError: Something in the data is wrong; the first ten mistakes of each kind with file and line.
        StorageError: The hub cannot be reached or has no such data set.
    """
    if source not in SOURCES:
        raise UsageError(f"data.source '{source}' is unknown{nearest(source, SOURCES)}")
    columns = (image_column, captions_column, id_column, split_column)
    _check_settings(source, path, columns, limit)
    findings = Findings()
    splits = SOURCES[source](Request(path or "", *columns, limit), findings)
    findings.raise_mistakes()
    if not splits:
        raise DataError(f"{path}: no image with captions in any split", *map(str, findings.notes()))
    return LoadedData(splits, findings.notes())


def _check_settings(source: str, path: str | None, columns: tuple[str | None, ...], limit: int | None) -> None:
    if source == "scenes" and path:
        raise UsageError(f"data.path '{path}' has no meaning for data.source scenes, which is drawn; leave it out")
    if source != "scenes" and not path:
        raise UsageError(f"data.source {source} needs data.path: where the data lies")
    if any(columns) and source not in _WITH_COLUMNS:
        given = ", ".join(f"'{column}'" for column in columns if column)
        raise UsageError(f"data.source {source} has no columns to choose, but {given} was given; leave it out")
    if source == "folder" and columns[2]:
        raise UsageError(f"data.id_column '{columns[2]}': data.source folder names images by their files; leave it out")
    if limit is not None and limit < 1:
        raise UsageError(f"data.limit is {limit}; give a number of images from 1, or null for all")
