"""A `dataset_*.json` and its photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from capdist.data.sources import load_source
from capdist.errors import DataError


def _photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 90, 20)).save(path)


def _entry(name: str, split: str = "train", *captions: str, **more: Any) -> dict[str, Any]:
    sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions or ("A dog .", "A big dog .")]
    return {"filename": name, "split": split, "sentences": sentences, **more}


def _write(root: Path, *entries: object) -> Path:
    file = root / "dataset_small.json"
    file.write_text(json.dumps({"images": entries, "dataset": "small"}))
    return file


def _mistakes(path: Path) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        load_source("karpathy", str(path))
    return caught.value.lines


@pytest.mark.parametrize("folder", [".", "images", "Flicker8k_Dataset", "flickr30k_images"])
def test_file_or_folder_with_photos_in_the_usual_places(tmp_path: Path, folder: str) -> None:
    file = _write(
        tmp_path, _entry("a.jpg"), _entry("b.jpg", "val"), _entry("c.jpg", "test"), _entry("d.jpg", "restval")
    )
    for name in "abcd":
        _photo(tmp_path / folder / f"{name}.jpg")
    for path in (file, tmp_path):
        loaded = load_source("karpathy", str(path))
        assert {split: len(table) for split, table in loaded.splits.items()} == {"train": 2, "validation": 1, "test": 1}
        assert loaded.splits["train"][0]["captions"] == ["A dog .", "A big dog ."]
        assert loaded.splits["train"]["image_id"][:] == ["a.jpg", "d.jpg"]
        assert Path(loaded.splits["test"][0]["image"]["path"]) == tmp_path / folder / "c.jpg"
        assert loaded.notes == ()


def test_filepath_of_coco(tmp_path: Path) -> None:
    _write(tmp_path, _entry("a.jpg", filepath="val2014"), _entry("a.jpg", filepath="train2014"))
    for folder in ("val2014", "train2014"):
        _photo(tmp_path / "images" / folder / "a.jpg")
    loaded = load_source("karpathy", str(tmp_path))
    assert loaded.splits["train"]["image_id"][:] == ["val2014/a.jpg", "train2014/a.jpg"]


def test_oddities_are_noted(tmp_path: Path) -> None:
    file = _write(
        tmp_path,
        _entry("a.jpg", "train", "A dog .", " "),
        _entry("gone.jpg"),
        _entry("b.jpg", "extra"),
        _entry("c.jpg", "val", ""),
    )
    for name in "abc":
        _photo(tmp_path / f"{name}.jpg")
    loaded = load_source("karpathy", str(tmp_path))
    assert list(loaded.splits) == ["train"]
    assert set(map(str, loaded.notes)) == {
        f"2 empty captions were left out: {file}: images[0].sentences[1], {file}: images[3].sentences[0]",
        "1 photo named in the caption file does not exist: gone.jpg",
        "1 image is in none of train, validation and test and was left out: b.jpg (extra)",
        "1 photo has no caption and was left out: c.jpg",
    }


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (_entry("../a.jpg"), "no plain file name"),
        (_entry("a.jpg", filepath="/etc"), "no plain file name"),
        (_entry("a.jpg", filepath=".."), "no plain file name"),
        (_entry("out/a.jpg"), "leads out of"),
        (_entry("ok.jpg"), "the photo stands further up"),
        (_entry("x.jpg", "train", "a \ud800 dog"), "control character"),
        ({"filename": "x.jpg", "split": "train"}, "expected filename, split and sentences[].raw"),
        ({"filename": "x.jpg", "split": "train", "sentences": [{"tokens": []}]}, "expected filename"),
        ({"filename": 3, "split": "train", "sentences": []}, "expected filename"),
        ("x.jpg", "expected filename"),
    ],
)
def test_bad_entry_is_named(tmp_path: Path, entry: object, complaint: str) -> None:
    root = tmp_path / "data"
    for path in (root / "ok.jpg", root / "x.jpg", tmp_path / "outside/a.jpg"):
        _photo(path)
    (root / "out").symlink_to(tmp_path / "outside")
    file = _write(root, _entry("ok.jpg"), entry)
    (mistake,) = _mistakes(root)
    assert mistake.startswith(f"{file}: images[1]")
    assert complaint in mistake


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    assert "expected exactly one dataset_*.json, found none" in _mistakes(tmp_path)[0]
    file = _write(tmp_path, _entry("a.jpg"))
    assert "none of the photos, such as a.jpg, lies there" in _mistakes(tmp_path)[0]
    file.write_text('{"images":\n[}')
    assert _mistakes(tmp_path)[0].startswith(f"{file}:2: not JSON")
    file.write_text("[" * 100_000)
    assert "nested too deeply" in _mistakes(tmp_path)[0]
    file.write_text("[]")
    assert 'expected {"images"' in _mistakes(tmp_path)[0]
    (tmp_path / "dataset_other.json").write_text("{}")
    assert "found dataset_other.json, dataset_small.json" in _mistakes(tmp_path)[0]
