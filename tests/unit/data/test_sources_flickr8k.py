"""The Flickr8k folder in both layouts, whole and damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from capdist.data.sources import LoadedData, load_source
from capdist.errors import DataError


def _photo(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 90, 200)).save(path)


def _published(
    root: Path, count: int = 4, image_folder: str = "Flicker8k_Dataset", texts: str = "Flickr8k_text"
) -> Path:
    """Write photos a.jpg, b.jpg, … with two captions each; the first `count - 2` train, then one each."""
    names = [f"{chr(97 + number)}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        _photo(root / image_folder / name, number)
    (root / texts).mkdir(parents=True, exist_ok=True)
    lines = [f"{name}#{number}\tA dog runs , {name[0]} {number} .\n" for name in names for number in range(2)]
    (root / texts / "Flickr8k.token.txt").write_text("".join(lines))
    for split, part in (("train", names[:-2]), ("dev", names[-2:-1]), ("test", names[-1:])):
        (root / texts / f"Flickr_8k.{split}Images.txt").write_text("\n".join(part) + "\n")
    return root


def _kaggle(root: Path, lines: list[str]) -> Path:
    for number in range(8):
        _photo(root / "Images" / f"{number}.jpg", number)
    (root / "captions.txt").write_text("image,caption\n" + "\n".join(lines) + "\n")
    return root


def _load(root: Path, **settings: int) -> LoadedData:
    return load_source("flickr8k", str(root), **settings)  # type: ignore[arg-type]


def _mistakes(root: Path) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        _load(root)
    return caught.value.lines


@pytest.mark.parametrize(
    "image_folder", ["Flicker8k_Dataset", "Flickr8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset"]
)
@pytest.mark.parametrize("texts", ["Flickr8k_text", "."])
def test_published_layout(tmp_path: Path, image_folder: str, texts: str) -> None:
    loaded = _load(_published(tmp_path, image_folder=image_folder, texts=texts))
    assert {split: len(table) for split, table in loaded.splits.items()} == {"train": 2, "validation": 1, "test": 1}
    assert loaded.notes == ()
    row = loaded.splits["validation"][0]
    path = str(tmp_path / image_folder / "c.jpg")
    assert row == {
        "image_id": "c.jpg",
        "image": {"path": path, "bytes": None},
        "captions": ["A dog runs , c 0 .", "A dog runs , c 1 ."],
    }


def test_columns_are_the_schema(tmp_path: Path) -> None:
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    expected = {"image_id": Value("string"), "image": ImageFeature(decode=False), "captions": List(Value("string"))}
    assert _load(_published(tmp_path)).splits["train"].features == Features(expected)


def test_no_test_list_gives_no_test_split(tmp_path: Path) -> None:
    root = _published(tmp_path)
    (root / "Flickr8k_text/Flickr_8k.testImages.txt").unlink()
    loaded = _load(root)
    assert list(loaded.splits) == ["train", "validation"]
    assert tuple(map(str, loaded.notes)) == ("1 photo is in no split and was left out: d.jpg",)


def test_limit_takes_the_first_of_each_split(tmp_path: Path) -> None:
    loaded = _load(_published(tmp_path, count=6), limit=2)
    assert loaded.splits["train"]["image_id"][:] == ["a.jpg", "b.jpg"]
    assert len(loaded.splits["test"]) == 1


def test_kaggle_captions_with_commas_and_quotes(tmp_path: Path) -> None:
    root = _kaggle(
        tmp_path,
        ['0.jpg,"A dog , a ""good"" one , runs ."', "0.jpg,Plain .", *(f"{n}.jpg,A cat ." for n in range(1, 8))],
    )
    loaded = _load(root)
    rows = {row["image_id"]: row for table in loaded.splits.values() for row in table}
    assert rows["0.jpg"]["captions"] == ['A dog , a "good" one , runs .', "Plain ."]


def test_kaggle_split_is_made_the_same_each_time_and_confessed(tmp_path: Path) -> None:
    root = _kaggle(tmp_path, [f"{number}.jpg,A cat ." for number in range(8)])
    loaded, again = _load(root), _load(root)
    assert {split: len(table) for split, table in loaded.splits.items()} == {"train": 6, "validation": 1, "test": 1}
    ids = {split: table["image_id"][:] for split, table in loaded.splits.items()}
    assert ids == {split: table["image_id"][:] for split, table in again.splits.items()}
    assert "not the official split" in str(loaded.notes[0])
    assert "Flickr_8k.*Images.txt" in str(loaded.notes[0])


def test_kaggle_with_the_official_lists(tmp_path: Path) -> None:
    root = _kaggle(tmp_path, [f"{number}.jpg,A cat ." for number in range(8)])
    (root / "Flickr_8k.trainImages.txt").write_text("3.jpg\n1.jpg\n")
    (root / "Flickr_8k.testImages.txt").write_text("2.jpg\n")
    loaded = _load(root)
    assert loaded.splits["train"]["image_id"][:] == ["3.jpg", "1.jpg"]
    assert tuple(map(str, loaded.notes)) == ("5 photos are in no split and were left out: 0.jpg, 4.jpg, 5.jpg, …",)


def test_kaggle_quote_never_closed_spoils_one_line(tmp_path: Path) -> None:
    root = _kaggle(tmp_path, ['0.jpg,"A dog', "1.jpg,A cat, black ."])
    quote, commas = _mistakes(root)
    assert quote.startswith(f"{root}/captions.txt:2: the quotes do not match")
    assert commas.startswith(f"{root}/captions.txt:3: 3 fields: the number of fields is not the 2 of the header")


def test_oddities_are_counted_and_not_fatal(tmp_path: Path) -> None:
    root = _published(tmp_path)
    token = root / "Flickr8k_text/Flickr8k.token.txt"
    token.write_text(token.read_text() + "a.jpg#2\t  \ngone.jpg.1#0\tA cat .\n")
    _photo(root / "Flicker8k_Dataset/silent.jpg")
    loaded = _load(root)
    assert set(map(str, loaded.notes)) == {
        "1 photo named in the caption file does not exist: gone.jpg.1",
        f"1 empty caption was left out: {token}:9",
        "1 photo has no caption and was left out: silent.jpg",
    }
    assert len(loaded.splits["train"][0]["captions"]) == 2


def test_byte_order_mark_and_composition(tmp_path: Path) -> None:
    root = _published(tmp_path)
    token = root / "Flickr8k_text/Flickr8k.token.txt"
    token.write_bytes(b"\xef\xbb\xbf" + token.read_bytes().replace(b"runs", "cafe\u0301\u2028runs".encode(), 1))
    assert _load(root).splits["train"][0]["captions"][0] == "A dog café runs , a 0 ."


def test_latin_1_names_line_and_byte(tmp_path: Path) -> None:
    root = _published(tmp_path)
    token = root / "Flickr8k_text/Flickr8k.token.txt"
    token.write_bytes(token.read_bytes() + b"a.jpg#2\tcaf\xe9\n")
    (mistake,) = _mistakes(root)
    assert mistake.startswith(f"{token}:9: byte 0xe9 at offset ")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("a.jpg#7 no tab", "expected 'photo.jpg#0', a tab and the caption"),
        ("a.jpg\tno number", "expected 'photo.jpg#0', a tab and the caption"),
        ("a.jpg#0\tagain", "the same photo and number"),
        ("a.jpg#9\ta \x00 dog", "control character"),
        ("../secret.jpg#0\tA dog", "no plain file name"),
        ("/etc/passwd#0\tA dog", "no plain file name"),
        ("..#0\tA dog", "no plain file name"),
        ("C:\\x.jpg#0\tA dog", "no plain file name"),
        ("x\0.jpg#0\tA dog", "no plain file name"),
        ("link.jpg#0\tA dog", "leads out of"),
        ("pipe.jpg#0\tA dog", "leads out of"),
        ("dir.jpg#0\tA dog", "leads out of"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    root = _published(tmp_path / "data")
    images = root / "Flicker8k_Dataset"
    _photo(tmp_path / "secret.jpg")
    (images / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    os.mkfifo(images / "pipe.jpg")
    (images / "dir.jpg").mkdir()
    token = root / "Flickr8k_text/Flickr8k.token.txt"
    token.write_text(token.read_text() + line + "\n")
    (mistake,) = _mistakes(root)
    assert mistake.startswith(f"{token}:9: ")
    assert complaint in mistake


def test_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    root = _published(tmp_path)
    images = root / "Flicker8k_Dataset"
    (images / "a.jpg").rename(images / "z.jpg")
    (images / "a.jpg").symlink_to("z.jpg")
    assert len(_load(root).splits["train"]) == 2


def test_photo_in_two_splits_is_refused(tmp_path: Path) -> None:
    root = _published(tmp_path)
    (root / "Flickr8k_text/Flickr_8k.testImages.txt").write_text("d.jpg\na.jpg\n")
    (mistake,) = _mistakes(root)
    assert "Flickr_8k.testImages.txt:2: a.jpg, also at" in mistake
    assert "trainImages.txt:1: the photo is listed twice" in mistake


def test_only_ten_mistakes_of_a_kind_are_shown(tmp_path: Path) -> None:
    root = _published(tmp_path)
    token = root / "Flickr8k_text/Flickr8k.token.txt"
    token.write_text(token.read_text() + "broken\n" * 25)
    mistakes = _mistakes(root)
    assert len(mistakes) == 11
    assert mistakes[-1].startswith("25 such places in all")


def test_missing_pieces_name_the_layout(tmp_path: Path) -> None:
    for root, complaint in ((tmp_path / "no", "does not exist"), (tmp_path, "no folder with photos")):
        (mistake,) = _mistakes(root)
        assert str(root) in mistake
        assert complaint in mistake
        assert "Flicker8k_Dataset/" in mistake
    (tmp_path / "Images").mkdir()
    assert "neither Flickr8k.token.txt nor captions.txt" in _mistakes(tmp_path)[0]


def test_no_photo_at_all_is_a_data_error(tmp_path: Path) -> None:
    root = _published(tmp_path)
    for photo in (root / "Flicker8k_Dataset").iterdir():
        photo.unlink()
    mistakes = _mistakes(root)
    assert "no image with captions in any split" in mistakes[0]
    assert "4 photos named in the caption file do not exist" in mistakes[1]


@pytest.mark.flickr8k
def test_the_real_folder() -> None:
    root = os.environ.get("FLICKR8K_ROOT")
    if not root:
        pytest.skip("FLICKR8K_ROOT is not set")
    loaded = load_source("flickr8k", root)
    assert len(loaded.splits["train"]) == 6_000
    assert len(loaded.splits["validation"]) == 1_000
    assert all(len(captions) == 5 for captions in loaded.splits["train"]["captions"])
    notes = "\n".join(map(str, loaded.notes))
    assert "1 photo named in the caption file does not exist: 2258277193_586949ec62.jpg.1" in notes
    if "test" not in loaded.splits:
        assert "91 photos are in no split" in notes
