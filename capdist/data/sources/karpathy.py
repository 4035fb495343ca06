"""The source `karpathy`: a `dataset_*.json` of Flickr8k, Flickr30k or COCO with the folder of its photos."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdist.data.sources.columns import caption_texts
from capdist.data.sources.findings import NO_CAPTION, UNKNOWN_SPLIT, Findings
from capdist.data.sources.photos import PhotoFolder, existing_folder, is_plain
from capdist.data.sources.records import Record, Request, split_named, to_splits
from capdist.data.sources.text_files import clean_caption, read_text
from capdist.errors import DataError

if TYPE_CHECKING:
    from datasets import DatasetDict

_LAYOUT = "a dataset_*.json (or a folder that holds one) and next to it the photos or a folder such as images/"
_IMAGE_FOLDERS = (
    ".",
    "images",
    "Images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "flickr8k_images",
    "flickr30k_images",
    "flickr30k_images/flickr30k_images",
    "flickr30k-images",
    "coco",
)
_PROBE = 100  # number of photos that decide which folder is meant


def load(request: Request, findings: Findings) -> DatasetDict:
    """Read the file or folder `request.path`; see `load_source`."""
    file = _json_file(request.path)
    entries = _read_entries(file, findings)
    photos = PhotoFolder(_image_folder(file.parent, [name for _, name, _ in entries]), findings)
    records: dict[str, list[Record]] = {}
    seen: set[str] = set()
    for place, name, entry in entries:
        if name in seen:
            findings.mistake("the photo stands further up; an image has one entry", f"{place}: {name[:100]!r}")
            continue
        seen.add(name)
        split = split_named(entry["split"])
        captions = _captions(entry, place, findings)
        path = photos.find(name, place)
        if split is None:
            findings.oddity(UNKNOWN_SPLIT, f"{name} ({entry['split']})")
        elif not captions:
            findings.oddity(NO_CAPTION, name)
        elif path:
            records.setdefault(split, []).append(Record(name, captions, path))
    return to_splits(records, request.limit)


def _json_file(path: str) -> Path:
    if Path(path).expanduser().is_file():
        return Path(path).expanduser().absolute()
    folder = existing_folder(path, _LAYOUT)
    files = sorted(folder.glob("dataset*.json"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{folder}: expected exactly one dataset_*.json, found {found}; name the file in data.path")
    return files[0]


def _read_entries(file: Path, findings: Findings) -> list[tuple[str, str, dict[str, Any]]]:
    """Return place, name (with `filepath` in front) and content of each well-formed entry."""
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{file}: not a caption file: nested too deeply") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DataError(f'{file}: expected {{"images": [{{"filename", "split", "sentences"}}]}}')
    entries = []
    for number, entry in enumerate(images):
        place = f"{file}: images[{number}]"
        if _is_well_formed(entry):
            folder = entry.get("filepath") or ""
            entries.append((place, f"{folder}/{entry['filename']}" if folder else entry["filename"], entry))
        else:
            findings.mistake("expected filename, split and sentences[].raw, all text", place)
    return entries


def _is_well_formed(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("sentences"), list):
        return False
    texts = (entry.get("filename"), entry.get("split"), entry.get("filepath") or "")
    return all(isinstance(text, str) for text in texts) and caption_texts(entry["sentences"]) is not None


def _captions(entry: dict[str, Any], place: str, findings: Findings) -> list[str]:
    texts = enumerate(caption_texts(entry["sentences"]) or [])
    cleaned = (clean_caption(text, f"{place}.sentences[{number}]", findings) for number, text in texts)
    return [caption for caption in cleaned if caption]


def _image_folder(root: Path, names: list[str]) -> Path:
    """Return the usual folder that holds most of the first photos."""
    probe = [name for name in names if is_plain(name)][:_PROBE]
    folders = [root / folder for folder in _IMAGE_FOLDERS if (root / folder).is_dir()]
    counts = [sum(os.path.isfile(folder / name) for name in probe) for folder in folders]
    best = max(counts, default=0)
    if probe and not best:
        tried = ", ".join(_IMAGE_FOLDERS[1:])
        raise DataError(f"{root}: none of the photos, such as {probe[0]}, lies there or in {tried}")
    return folders[counts.index(best)]
