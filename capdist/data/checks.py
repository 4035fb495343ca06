"""Reads every caption and every image once and lists what is wrong, before a training run starts."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from capdist.data.sources import LoadedData
from capdist.data.sources.findings import MISSING_PHOTO, Note
from capdist.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_Captions = tuple[str, list[str]]  # an image id and its captions
_CHUNK = 256  # images that are read at a time
SHOWN = 10

_NEVER_PUBLISHED = "2258277193_586949ec62.jpg.1"
"""Flickr8k's caption file names this photo, but no official split list does, and it was never published."""


@dataclass(frozen=True)
class Report:
    """What `check_data` found.

    Attributes:
        problems: What must be fixed. Photos that cannot be read and photos that are in two splits have one line each;
            after ten of a kind follows their number. Missing photos that captions name share one line; training leaves
            them out.
        warnings: What is worth a look: photos that are twice in one split, images with fewer captions than most, and
            the other notes of the source.
        statistics: Holds for each split `images`, `captions`, `captions_per_image` (mean), and `words_mean`,
            `words_p95` and `words_max`. The last three count words per caption, split at white space.
    """

    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    statistics: dict[str, dict[str, float]]

    @property
    def is_clean(self) -> bool:
        """Whether there are no problems; warnings do not count."""
        return not self.problems


class _Image(NamedTuple):
    """What is remembered of one image."""

    split: str
    image_id: str
    digest: str | None  # None: there is nothing to read
    complaint: str | None  # what the decoder said


def check_data(
    loaded: LoadedData,
    *,
    decode: Callable[[dict[str, Any]], object],
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read all captions and decode all images.

    Args:
        loaded: What `load_source` gave.
        decode: Takes an image as `{"path", "bytes"}`; raises `DataError` for one that cannot be used. Called from
            several threads.
        progress: Called with the number of images done and of all images, from time to time.

    Returns:
        The report.
    """
    images = _read_images(loaded, decode, progress)
    captions = {split: _captions(table) for split, table in loaded.splits.items()}
    leaks, doubles = _same_bytes(images)
    missing = [note for note in loaded.notes if _is_of_missing_photos(note)]
    problems = [
        *_some([image.complaint for image in images if image.complaint], "images that cannot be read"),
        *_some(leaks, "photos in two splits"),
        *(f"{note}; put what is missing into the image folder, or take its captions out" for note in missing),
    ]
    warnings = [
        *_some(doubles, "photos twice in one split"),
        *_some(_few_captions(captions), "images with fewer captions than most"),
        *(str(note) for note in loaded.notes if note not in missing),
    ]
    statistics = {split: _statistics(rows) for split, rows in captions.items()}
    return Report(tuple(problems), tuple(warnings), statistics)


def _read_images(
    loaded: LoadedData,
    decode: Callable[[dict[str, Any]], object],
    progress: Callable[[int, int], None] | None,
) -> list[_Image]:
    def read(split: str, row: dict[str, Any]) -> _Image:
        try:
            decode(row["image"])
            complaint = None
        except DataError as error:
            complaint = f"{split}: {row['image_id']}: {'; '.join(error.lines)}"
        return _Image(split, row["image_id"], _digest(row["image"]), complaint)

    total = sum(len(table) for table in loaded.splits.values())
    images: list[_Image] = []
    with ThreadPoolExecutor(2) as pool:
        for split, rows in _chunks(loaded):
            images += pool.map(read, [split] * len(rows), rows)
            if progress:
                progress(len(images), total)
    return images


def _chunks(loaded: LoadedData) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for split, table in loaded.splits.items():
        for start in range(0, len(table), _CHUNK):
            yield split, table.select(range(start, min(start + _CHUNK, len(table)))).to_list()


def _digest(image: dict[str, Any]) -> str | None:
    content = image["bytes"]
    if content is None:
        try:
            content = Path(image["path"] or "").read_bytes()
        except OSError:
            return None  # the decoder has complained
    return hashlib.sha256(content).hexdigest()


def _captions(table: Dataset) -> list[_Captions]:
    columns = table.select_columns(["image_id", "captions"])[:]
    return list(zip(columns["image_id"], columns["captions"], strict=True))


def _same_bytes(images: list[_Image]) -> tuple[list[str], list[str]]:
    """Return lines on photos with the same bytes: those across splits, a leak, and those within one."""
    groups: defaultdict[str, list[_Image]] = defaultdict(list)
    for image in images:
        if image.digest:
            groups[image.digest].append(image)
    leaks, doubles = [], []
    for group in groups.values():
        names = ", ".join(f"{image.image_id} ({image.split})" for image in group)
        if len({image.split for image in group}) > 1:
            leaks.append(f"the same photo, byte for byte, is in several splits: {names}; keep it in one")
        elif len(group) > 1:
            doubles.append(f"{len(group)} photos are the same, byte for byte: {names}")
    return leaks, doubles


def _is_of_missing_photos(note: Note) -> bool:
    return note.kind == MISSING_PHOTO and note.examples != (_NEVER_PUBLISHED,)


def _few_captions(captions: dict[str, list[_Captions]]) -> list[str]:
    counts = Counter(len(texts) for rows in captions.values() for _, texts in rows)
    if not counts:
        return []
    usual = counts.most_common(1)[0][0]
    return [
        f"{split}: {image_id}: {len(texts)} captions, most have {usual}"
        for split, rows in captions.items()
        for image_id, texts in rows
        if len(texts) < usual
    ]


def _statistics(rows: list[_Captions]) -> dict[str, float]:
    captions = [text for _, texts in rows for text in texts]
    lengths = sorted(len(caption.split()) for caption in captions) or [0]
    return {
        "images": len(rows),
        "captions": len(captions),
        "captions_per_image": len(captions) / max(1, len(rows)),
        "words_mean": sum(lengths) / len(lengths),
        "words_p95": lengths[math.ceil(0.95 * len(lengths)) - 1],
        "words_max": lengths[-1],
    }


def _some(lines: list[str], what: str) -> list[str]:
    """Return the first lines and, if there are more, their number."""
    more = [f"{len(lines):,} {what} in all"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more
