"""The check before a run: damaged and missing photos, leaks, few captions, figures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, UnidentifiedImageError

from capdist.commands.check import check_recipe
from capdist.data.checks import Report, check_data
from capdist.data.sources import LoadedData, load_source
from capdist.data.sources.findings import Note
from capdist.data.sources.records import Record, to_splits
from capdist.errors import DataError
from capdist.recipe.sections import Recipe


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


def _check(*notes: Note, **splits: list[Record]) -> Report:
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


def test_few_captions_and_notes_are_worth_a_look(tmp_path: Path) -> None:
    paths = [_photo(tmp_path / f"{number}.png", number) for number in range(4)]
    train = [Record("a", ["x", "y"], paths[0]), Record("b", ["x"], paths[1]), Record("c", ["x", "y"], paths[2])]
    # Only the kind of a note counts, not what it says.
    likeness = "5 photos named in the caption file do not exist: a.jpg"
    report = _check(Note("a note"), Note(likeness), train=train, test=[Record("d", ["x", "y"], paths[3])])
    assert report.is_clean
    assert report.warnings == ("train: b: 1 captions, most have 2", "a note", likeness)


def _flickr8k(root: Path, names: list[str]) -> str:
    """Every caption in `Flickr8k.token.txt`, the photos in the training list."""
    (root / "Flickr8k_text").mkdir()
    lines = [f"{name}#0\tA dog .\n" for name in names]
    (root / "Flickr8k_text/Flickr8k.token.txt").write_text("".join(lines))
    listed = [name for name in names if name.endswith(".png")]
    (root / "Flickr8k_text/Flickr_8k.trainImages.txt").write_text("\n".join(listed))
    (root / "images").mkdir()
    for name in PHOTOS:
        (root / name).rename(root / "images" / name)
    return str(root)


def _karpathy(root: Path, names: list[str]) -> str:
    images = [{"filename": name, "split": "train", "sentences": [{"raw": "A dog."}]} for name in names]
    (root / "dataset.json").write_text(json.dumps({"images": images}))
    return str(root)


def _hub(root: Path, names: list[str]) -> str:
    from datasets import Dataset, DatasetDict

    rows = {"file_name": names, "captions": [["A dog."]] * len(names)}
    DatasetDict(train=Dataset.from_dict(rows)).save_to_disk(str(root))
    return str(root)


def _folder(root: Path, names: list[str]) -> str:
    rows = [{"file_name": name, "captions": ["A dog."], "split": "train"} for name in names]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root)


PHOTOS = ("1.png", "2.png")
SOURCES: dict[str, Callable[[Path, list[str]], str]] = {
    "flickr8k": _flickr8k, "karpathy": _karpathy, "hub": _hub, "folder": _folder,
}  # fmt: skip


def _recipe(source: str, root: Path, *more: str) -> Recipe:
    """Name two photos that are there, and more, in the captions of a source."""
    for number, name in enumerate(PHOTOS):
        _photo(root / name, number)
    return Recipe(data={"source": source, "path": SOURCES[source](root, [*PHOTOS, *more])})


@pytest.mark.parametrize("source", SOURCES)
def test_a_photo_that_does_not_exist_is_a_problem(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"gone_{number}.png" for number in range(5)]
    with pytest.raises(DataError) as caught:
        check_recipe(_recipe(source, tmp_path, *names))
    (mistake,) = caught.value.lines
    assert "5 photos named in the caption file do not exist: gone_" in mistake
    printed = capsys.readouterr().out
    assert "can be read" not in printed
    assert "warning" not in printed, "told twice"


@pytest.mark.parametrize("source", SOURCES)
def test_what_can_be_read_is_told_only_if_it_can(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_recipe(_recipe(source, tmp_path)).is_clean
    assert "every photo of these splits can be read" in capsys.readouterr().out


def test_the_photo_that_flickr8k_never_had_is_only_worth_a_look(tmp_path: Path) -> None:
    """Its caption file names `2258277193_586949ec62.jpg.1`, its folder and its lists do not: nobody can mend that."""
    never = "2258277193_586949ec62.jpg.1"
    (tmp_path / "as_published").mkdir()
    report = check_recipe(_recipe("flickr8k", tmp_path / "as_published", never))
    (warning,) = report.warnings
    assert never in warning
    (tmp_path / "incomplete").mkdir()
    with pytest.raises(DataError, match="2 photos named in the caption file do not exist") as caught:
        check_recipe(_recipe("flickr8k", tmp_path / "incomplete", never, "gone.png"))
    assert "gone.png" in str(caught.value)


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
