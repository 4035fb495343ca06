"""The source `flickr8k`: the folder as published, or as packed on Kaggle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from capdist.data.sources.findings import NO_CAPTION, NO_SPLIT, Findings
from capdist.data.sources.photos import PhotoFolder, existing_folder
from capdist.data.sources.records import Record, Request, split_by_hash, to_splits
from capdist.data.sources.text_files import clean_caption, read_csv, read_lines
from capdist.errors import DataError

if TYPE_CHECKING:
    from datasets import DatasetDict

_LAYOUT = (
    "Flicker8k_Dataset/ with the photos and Flickr8k_text/ with Flickr8k.token.txt and the "
    "Flickr_8k.*Images.txt lists, or Images/ and captions.txt"
)
_IMAGE_FOLDERS = (
    "Flicker8k_Dataset",  # the published spelling
    "Flickr8k_Dataset",
    "Flickr8k_Dataset/Flicker8k_Dataset",  # the archive unpacked into a folder of its own name
    "Images",
    "images",
)
_SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
_TOKEN_KEY = re.compile(r"(.+)#(\d+)")
_HELD_OUT = 1_000 / 8_000

# The captions of a photo, and the place where its name first appears.
Captions = dict[str, tuple[str, list[str]]]


def load(request: Request, findings: Findings) -> DatasetDict:
    """Read the folder `request.path`; see `load_source`."""
    root = existing_folder(request.path, _LAYOUT)
    photos = PhotoFolder(_image_folder(root), findings)
    captions = _read_captions(root, findings)
    paths = {name: path for name, (place, _) in captions.items() if (path := photos.find(name, place))}
    usable = {name: Record(name, captions[name][1], path) for name, path in paths.items() if captions[name][1]}
    splits = _read_splits(root, findings) or _made_up_splits(list(usable), findings)
    _note_left_out(photos, usable, captions, splits, findings)
    records = {split: [usable[name] for name in names if name in usable] for split, names in splits.items()}
    return to_splits(records, request.limit)


def _image_folder(root: Path) -> Path:
    for name in _IMAGE_FOLDERS:
        # The outer folder of a doubly packed archive holds no photo itself.
        if (root / name).is_dir() and not (root / name / "Flicker8k_Dataset").is_dir():
            return root / name
    raise DataError(f"{root}: no folder with photos; expected {_LAYOUT}")


def _text_file(root: Path, name: str) -> Path | None:
    candidates = (root / "Flickr8k_text" / name, root / name)
    return next((path for path in candidates if path.is_file()), None)


def _read_captions(root: Path, findings: Findings) -> Captions:
    if published := _text_file(root, "Flickr8k.token.txt"):
        return _read_token_file(published, findings)
    if kaggle := _text_file(root, "captions.txt"):
        return _read_kaggle_file(kaggle, findings)
    raise DataError(f"{root}: neither Flickr8k.token.txt nor captions.txt; expected {_LAYOUT}")


def _read_token_file(path: Path, findings: Findings) -> Captions:
    captions: Captions = {}
    seen: set[str] = set()
    for place, line in read_lines(path):
        key, tab, caption = line.partition("\t")
        match = _TOKEN_KEY.fullmatch(key)
        if not tab or match is None:
            findings.mistake("expected 'photo.jpg#0', a tab and the caption", place)
        elif key in seen:
            findings.mistake("the same photo and number stand further up; number the captions", f"{place}: {key}")
        else:
            seen.add(key)
            _add(captions, match[1], caption, place, findings)
    return captions


def _read_kaggle_file(path: Path, findings: Findings) -> Captions:
    captions: Captions = {}
    for place, row in read_csv(path, findings):
        if not {"image", "caption"} <= row.keys():
            raise DataError(f"{path}:1: the columns are {', '.join(row)}; expected the header 'image,caption'")
        _add(captions, row["image"].strip(), row["caption"], place, findings)
    return captions


def _add(captions: Captions, name: str, caption: str, place: str, findings: Findings) -> None:
    if "/" in name:
        findings.mistake("is no plain file name; the photos lie in one folder", f"{place}: {name[:100]!r}")
        return
    texts = captions.setdefault(name, (place, []))[1]
    if text := clean_caption(caption, place, findings):
        texts.append(text)


def _read_splits(root: Path, findings: Findings) -> dict[str, list[str]]:
    """Read the published lists that are there; a photo may be in one of them, once."""
    splits: dict[str, list[str]] = {}
    first_place: dict[str, str] = {}
    for split, file in _SPLIT_FILES.items():
        path = _text_file(root, file)
        if path is None:
            continue
        names = splits.setdefault(split, [])
        for place, line in read_lines(path):
            name = line.strip()
            if name in first_place:
                kind = "the photo is listed twice; a photo belongs to one split"
                findings.mistake(kind, f"{place}: {name}, also at {first_place[name]}")
            else:
                first_place[name] = place
                names.append(name)
    return splits


def _made_up_splits(names: list[str], findings: Findings) -> dict[str, list[str]]:
    findings.remark(
        "this is not the official split: no Flickr_8k.*Images.txt lists were found, so photos were divided "
        "6 : 1 : 1 by the hash of their names; results do not compare with published ones until "
        "the official lists are put into the folder"
    )
    return split_by_hash(names, _HELD_OUT)


def _note_left_out(
    photos: PhotoFolder,
    usable: dict[str, Record],
    captions: Captions,
    splits: dict[str, list[str]],
    findings: Findings,
) -> None:
    listed = {name for names in splits.values() for name in names}
    for name in sorted(listed.union(photos.names())):
        if not captions.get(name, ("", []))[1]:
            findings.oddity(NO_CAPTION, name)
        elif name in usable and name not in listed:
            findings.oddity(NO_SPLIT, name)
