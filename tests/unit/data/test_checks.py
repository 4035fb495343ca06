"""The check before a run: damaged photos, leaks, missing captions, figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, UnidentifiedImageError

from capdist.data.checks import Report, check_data
from capdist.data.sources import LoadedData, load_source
from capdist.data.sources.records import Record, to_splits
from capdist.errors import DataError


def _decode(image: dict[str, Any]) -> Image.Image:
    try:
        photo = Image.open(image["path"] or io.BytesIO(image["bytes"]))
        photo.load()
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{image['path'] or 'embedded image'}: {error}") from error
    return photo


def _photo(path: Path, shade: int) -> str:
    Image.new("RGB", (8, 8), (shade, 20, 40)).save(path)
    return str(path)


def _check(*notes: str, **splits: list[Record]) -> Report:
    return check_data(LoadedData(to_splits(splits, None), notes), decode=_decode)


def test_scenes_are_clean() -> None:
    calls: list[tuple[int, int]] = []
    report = check_data(load_source("scenes", limit=20), decode=_decode, progress=lambda *done: calls.append(done))
    assert report.is_clean
    assert report.warnings == ()
    assert report.statistics["test"]["images"] == 20
    assert report.statistics["test"]["captions_per_image"] == 5
    assert calls[-1] == (60, 60)


def test_damaged_and_missing_photos_are_named(tmp_path: Path) -> None:
    whole = _photo(tmp_path / "whole.png", 1)
    half = tmp_path / "half.png"
    half.write_bytes(Path(whole).read_bytes()[:-30])
    missing = str(tmp_path / "missing.png")
    records = [Record(name, ["a dog"], path) for name, path in (("w", whole), ("h", str(half)), ("m", missing))]
    report = _check(train=records)
    assert not report.is_clean
    assert [line.split(": ")[:3] for line in report.problems] == [["train", "h", str(half)], ["train", "m", missing]]


def test_same_photo_in_two_splits_is_a_problem_in_one_a_warning(tmp_path: Path) -> None:
    one, two, three = (_photo(tmp_path / f"{name}.png", shade) for name, shade in (("1", 5), ("2", 5), ("3", 9)))
    report = _check(train=[Record("1", ["a"], one), Record("2", ["a"], two), Record("3", ["a"], three)])
    assert report.is_clean
    assert report.warnings == ("2 photos are the same, byte for byte: 1 (train), 2 (train)",)
    report = _check(train=[Record("1", ["a"], one)], test=[Record("2", ["a"], two)])
    assert report.problems == (
        "the same photo, byte for byte, is in several splits: 1 (train), 2 (test); keep it in one",
    )


def test_captions_and_ids(tmp_path: Path) -> None:
    paths = [_photo(tmp_path / f"{number}.png", number) for number in range(4)]
    train = [Record("a", ["x", "y"], paths[0]), Record("b", [], paths[1]), Record("c", ["x", " "], paths[2])]
    report = _check("a note", train=train, test=[Record("a", ["x", "y"], paths[3])])
    assert report.problems == ("train: b: no caption", "train: c: an empty caption", "a: stands in train and test")
    assert report.warnings == ("train: b: 0 captions, most have 2", "a note")


def test_words_per_caption(tmp_path: Path) -> None:
    captions = ["word " * length for length in range(1, 21)]
    report = _check(train=[Record("a", captions, _photo(tmp_path / "a.png", 1))])
    assert report.statistics["train"] == {
        "images": 1,
        "captions": 20,
        "captions_per_image": 20.0,
        "words_mean": 10.5,
        "words_p95": 19,
        "words_max": 20,
    }


def test_long_lists_are_cut_and_counted() -> None:
    records = [Record(f"{number}", ["a"], content=f"no picture {number}".encode()) for number in range(600)]
    report = _check(train=records)
    assert len(report.problems) == 11
    assert report.problems[-1] == "600 images that cannot be read in all"


def test_a_bug_in_the_decoder_is_not_hidden(tmp_path: Path) -> None:
    loaded = LoadedData(to_splits({"train": [Record("a", ["a"], _photo(tmp_path / "a.png", 1))]}, None), ())

    def broken(image: dict[str, Any]) -> object:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        check_data(loaded, decode=broken)
