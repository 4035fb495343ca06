"""One's own photos with metadata."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from capdist.data.sources import LoadedData, load_source
from capdist.errors import DataError, UsageError


def _photos(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10, 90, 20)).save(folder / name)


def _jsonl(folder: Path, *rows: object) -> Path:
    file = folder / "metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _captions(loaded: LoadedData) -> dict[str, list[str]]:
    return {row["image_id"]: row["captions"] for table in loaded.splits.values() for row in table}


def _counts(loaded: LoadedData) -> dict[str, int]:
    return {split: len(table) for split, table in loaded.splits.items()}


def _mistakes(root: Path) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        load_source("folder", str(root))
    return caught.value.lines


def test_jsonl_with_lists_and_splits(tmp_path: Path) -> None:
    _photos(tmp_path, "a.png", "b.png", "sub/c.png")
    _jsonl(
        tmp_path,
        {"file_name": "a.png", "captions": ["A cat.", "A grey cat."], "split": "train"},
        {"file_name": "b.png", "captions": ["A dog."], "split": "dev"},
        {"file_name": "sub/c.png", "captions": "A cow.", "split": "test"},
    )
    loaded = load_source("folder", str(tmp_path))
    assert _counts(loaded) == {"train": 1, "validation": 1, "test": 1}
    assert _captions(loaded) == {"a.png": ["A cat.", "A grey cat."], "b.png": ["A dog."], "sub/c.png": ["A cow."]}
    assert loaded.notes == ()


@pytest.mark.parametrize(
    "text",
    [
        'file_name,caption\na.png,"A cat, grey."\na.png,Another.\n',
        'file_name,caption_0,caption_1,caption_2\na.png,"A cat, grey.",Another.,\n',
        'file_name,text\r\na.png,"A cat, grey."\r\na.png,Another.\r\n',
        '\ufefffile_name,caption\na.png,"A cat, grey."\na.png,Another.\n',
    ],
)
def test_csv_with_several_rows_or_columns(tmp_path: Path, text: str) -> None:
    _photos(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(text, newline="")
    assert _captions(load_source("folder", str(tmp_path))) == {"a.png": ["A cat, grey.", "Another."]}


@pytest.mark.parametrize("header", ["file_name,caption,caption,caption", "file_name, caption ,caption,split"])
def test_csv_column_that_stands_twice_is_named(tmp_path: Path, header: str) -> None:
    _photos(tmp_path, "a.png")
    file = tmp_path / "metadata.csv"
    file.write_text(f"\n{header}\na.png,A cat.,A grey cat.,test\n")
    (mistake,) = _mistakes(tmp_path)
    assert mistake.startswith(f"{file}:2: {header.count('caption')} columns are called 'caption'")
    assert "caption_1, caption_2" in mistake
    file.write_text("file_name,caption_1,caption_2,split\na.png,A cat.,A grey cat.,test\n")
    assert _captions(load_source("folder", str(tmp_path))) == {"a.png": ["A cat.", "A grey cat."]}


def test_csv_columns_without_a_name_are_what_spreadsheets_leave(tmp_path: Path) -> None:
    _photos(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption,,\na.png,A cat.,,\n")
    assert _captions(load_source("folder", str(tmp_path))) == {"a.png": ["A cat."]}


def test_folders_for_splits(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        _photos(tmp_path / split, *(f"{number}.png" for number in range(count)))
        _jsonl(tmp_path / split, *({"file_name": f"{number}.png", "captions": ["A cat."]} for number in range(count)))
    loaded = load_source("folder", str(tmp_path))
    assert _counts(loaded) == {"train": 3, "validation": 2}
    assert loaded.splits["validation"]["image_id"][:] == ["val/0.png", "val/1.png"]


@pytest.mark.parametrize(("count", "parts"), [(2, (2,)), (3, (1, 1, 1)), (20, (16, 2, 2))])
def test_split_is_made_where_there_is_none(tmp_path: Path, count: int, parts: tuple[int, ...]) -> None:
    names = [f"{number}.png" for number in range(count)]
    _photos(tmp_path, *names)
    _jsonl(tmp_path, *({"file_name": name, "captions": ["A cat."]} for name in names))
    loaded = load_source("folder", str(tmp_path))
    assert tuple(_counts(loaded).values()) == parts
    assert str(loaded.notes[0]).startswith("no split is given, so photos were divided by the hash of their names")
    _jsonl(tmp_path, *({"file_name": name, "captions": ["A cat."]} for name in reversed(names)))
    again = load_source("folder", str(tmp_path))
    assert {k: v["image_id"][:] for k, v in again.splits.items()} == {
        k: v["image_id"][:] for k, v in loaded.splits.items()
    }


def test_a_split_that_is_made_is_that_of_every_version(tmp_path: Path) -> None:
    """Photos that a model was trained on must not become those it is tested on."""
    names = [f"{number}.png" for number in range(20)]
    _photos(tmp_path, *names)
    _jsonl(tmp_path, *({"file_name": name, "captions": ["A cat."]} for name in names))
    splits = load_source("folder", str(tmp_path)).splits
    ordered = sorted(names, key=lambda name: hashlib.sha256(b"0:" + name.encode()).hexdigest())
    assert splits["validation"]["image_id"][:] == ordered[:2]
    assert splits["test"]["image_id"][:] == ordered[2:4]
    assert splits["train"]["image_id"][:] == ordered[4:]


@pytest.mark.parametrize("empty", [None, "", " "])
@pytest.mark.parametrize("as_csv", [False, True])
def test_a_split_column_without_a_split_is_as_none(tmp_path: Path, empty: str | None, as_csv: bool) -> None:
    names = [f"{number}.png" for number in range(20)]
    _photos(tmp_path, *names)
    if as_csv:
        rows = "".join(f"{name},A cat.,{empty or ''}\n" for name in names)
        (tmp_path / "metadata.csv").write_text(f"file_name,caption,split\n{rows}")
    else:
        _jsonl(tmp_path, *({"file_name": name, "captions": ["A cat."], "split": empty} for name in names))
    loaded = load_source("folder", str(tmp_path))
    assert _counts(loaded) == {"train": 16, "validation": 2, "test": 2}
    assert str(loaded.notes[0]).startswith("no split is given")


def test_photos_without_a_split_among_others_are_left_out(tmp_path: Path) -> None:
    _photos(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption,split\na.png,A.,train\nb.png,B.,\nc.png,C.,test\n")
    loaded = load_source("folder", str(tmp_path))
    assert _counts(loaded) == {"train": 1, "test": 1}
    assert tuple(map(str, loaded.notes)) == (
        "1 image is in none of train, validation and test and was left out: b.png (none)",
    )


def test_chosen_columns(tmp_path: Path) -> None:
    _photos(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("pic,said,part\na.png,A cat.,test\n")
    loaded = load_source("folder", str(tmp_path), image_column="pic", captions_column="said", split_column="part")
    assert _counts(loaded) == {"test": 1}
    with pytest.raises(DataError, match="columns are pic, said, part"):
        load_source("folder", str(tmp_path), image_column="photo")
    with pytest.raises(DataError, match="none of the columns pic, said, part is called file_name"):
        load_source("folder", str(tmp_path))
    with pytest.raises(UsageError, match="data.id_column"):
        load_source("folder", str(tmp_path), id_column="pic")


def test_oddities_are_noted(tmp_path: Path) -> None:
    _photos(tmp_path, "a.png", "b.png", "c.png", "silent.png")
    _jsonl(
        tmp_path,
        {"file_name": "a.png", "captions": ["A cat.", ""], "split": "train"},
        {"file_name": "b.png", "captions": [], "split": "train"},
        {"file_name": "c.png", "captions": ["A dog."], "split": "spare"},
        {"file_name": "gone.png", "captions": ["A dog."], "split": "train"},
    )
    loaded = load_source("folder", str(tmp_path))
    assert _counts(loaded) == {"train": 1}
    assert sorted(map(str, loaded.notes)) == [
        f"1 empty caption was left out: {tmp_path}/metadata.jsonl:1",
        "1 image is in none of train, validation and test and was left out: c.png (spare)",
        "1 photo named in the caption file does not exist: gone.png",
        "2 photos have no caption and were left out: silent.png, b.png",
    ]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"file_name": "../x.png", "captions": ["A"]}, "no plain file name"),
        ({"file_name": "/etc/passwd", "captions": ["A"]}, "no plain file name"),
        ({"file_name": "link.png", "captions": ["A"]}, "leads out of"),
        ({"file_name": "a.png", "captions": ["A"]}, "the photo has a row already"),
        ({"file_name": "a.png", "caption": "A", "split": "test"}, "the photo is in another split"),
        ({"file_name": 3, "captions": ["A"]}, "must be text"),
        ({"file_name": "b.png", "captions": [3]}, "must be text"),
        ({"file_name": "b.png"}, "no captions in the columns file_name"),
        ({"captions": ["A"]}, "none of the columns captions is called file_name"),
        ({"file_name": "b.png", "captions": ["a \x07 dog"]}, "control character"),
        (["b.png"], "expected one JSON object"),
    ],
)
def test_bad_row_is_named(tmp_path: Path, row: object, complaint: str) -> None:
    root = tmp_path / "data"
    _photos(root, "a.png", "b.png")
    _photos(tmp_path, "x.png")
    (root / "link.png").symlink_to(tmp_path / "x.png")
    file = _jsonl(root, {"file_name": "a.png", "caption": "A cat.", "split": "train"}, row)
    (mistake,) = _mistakes(root)
    assert mistake.startswith(f"{file}:2: ")
    assert complaint in mistake


def test_missing_or_doubtful_metadata(tmp_path: Path) -> None:
    assert "no metadata.jsonl or metadata.csv" in _mistakes(tmp_path)[0]
    _jsonl(tmp_path)
    assert "no image with captions" in _mistakes(tmp_path)[0]
    (tmp_path / "metadata.csv").write_text("file_name,caption\n")
    assert "keep one of them" in _mistakes(tmp_path)[0]
