"""Data sets in the Hugging Face formats, read from local folders; the hub itself is never asked."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from PIL import Image

from capdist.data.sources import load_source
from capdist.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 20, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def _table(count: int, first: int = 0, **columns: list[Any]) -> Dataset:
    cells = [{"path": None, "bytes": _png(first + number)} for number in range(count)]
    return Dataset.from_dict({"image": cells, **columns}).cast_column("image", datasets.Image())


def _five(count: int) -> dict[str, list[str]]:
    return {f"caption_{n}": [f"A dog {n} {row} ." for row in range(count)] for n in range(5)}


def _save(root: Path, **splits: Dataset) -> str:
    DatasetDict(splits).save_to_disk(str(root / "data"))
    return str(root / "data")


def _mistakes(path: str, **columns: str) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        load_source("hub", path, **columns)  # type: ignore[arg-type]
    return caught.value.lines


def test_save_to_disk_with_five_columns(tmp_path: Path) -> None:
    path = _save(tmp_path, train=_table(3, **_five(3)), dev=_table(2, 3, **_five(2)), test=_table(1, 5, **_five(1)))
    loaded = load_source("hub", path)
    assert {split: len(table) for split, table in loaded.splits.items()} == {"train": 3, "validation": 2, "test": 1}
    row = loaded.splits["validation"][1]
    assert row["image_id"] == "dev_000001"
    assert row["image"]["bytes"] == _png(4)
    assert row["captions"] == [f"A dog {n} 1 ." for n in range(5)]
    assert loaded.splits["train"].features == Features(
        {"image_id": Value("string"), "image": datasets.Image(decode=False), "captions": List(Value("string"))}
    )
    assert loaded.splits["train"].cache_files, "images stay on the disk, not in memory"


def test_parquet_folder_with_lists_and_ids(tmp_path: Path) -> None:
    (tmp_path / "hub/data").mkdir(parents=True)
    for split, first in (("train", 0), ("test", 9)):
        ids = [f"{split}{n}.jpg" for n in range(2)]
        captions = [["A dog .", "  "], ["A cat ."]]
        table = _table(2, first, captions=captions, filename=ids)
        table.to_parquet(str(tmp_path / f"hub/data/{split}-00000-of-00001.parquet"))
    loaded = load_source("hub", str(tmp_path / "hub"), limit=1)
    assert loaded.splits["test"]["image_id"][:] == ["test0.jpg"]
    assert loaded.splits["test"][0]["captions"] == ["A dog ."]
    assert loaded.splits["train"][0]["image"]["bytes"] == _png(0)
    assert str(loaded.notes[0]).startswith("2 empty captions were left out")


@pytest.mark.parametrize("with_id", [True, False])
def test_one_caption_a_row_is_grouped(tmp_path: Path, with_id: bool) -> None:
    cells = [{"path": None, "bytes": _png(shade)} for shade in (1, 2, 1, 2, 3)]
    columns: dict[str, list[Any]] = {"image": cells, "caption": ["a", "b", "c", "d", "e"]}
    if with_id:
        columns["image_id"] = [1, 2, 1, 2, 3]
    path = _save(tmp_path, train=Dataset.from_dict(columns).cast_column("image", datasets.Image()))
    table = load_source("hub", path).splits["train"]
    assert table["captions"][:] == [["a", "c"], ["b", "d"], ["e"]]
    assert [row["image"]["bytes"] for row in table] == [_png(1), _png(2), _png(3)]
    if with_id:
        assert table["image_id"][:] == ["1", "2", "3"]


@pytest.mark.parametrize("asked", ["split", None])
def test_split_by_a_column(tmp_path: Path, asked: str | None) -> None:
    words = ["train", "val", "train", "restval", "other", None]
    path = _save(tmp_path, test=_table(6, text=["a", "b", "c", "d", "e", "f"], split=words))
    loaded = load_source("hub", path, split_column=asked)
    assert loaded.splits["train"]["captions"][:] == [["a"], ["c"], ["d"]]
    assert loaded.splits["validation"]["captions"][:] == [["b"]]
    left_out = [note for note in map(str, loaded.notes) if "are in none of train, validation and test" in note]
    assert len(left_out) == 1
    assert "(other)" in left_out[0]
    assert "(none)" in left_out[0]


def test_chosen_columns(tmp_path: Path) -> None:
    table = _table(2, said=[["a"], ["b"]], name=["x", "y"]).rename_column("image", "look")
    path = _save(tmp_path, train=table)
    loaded = load_source("hub", path, image_column="look", captions_column="said", id_column="name")
    assert loaded.splits["train"]["image_id"][:] == ["x", "y"]
    assert "no captions in the columns said, name" in _mistakes(path)[0]
    assert (
        "data.id_column is 'nr', but the columns are look, said, name"
        in _mistakes(path, captions_column="sa*", id_column="nr")[0]
    )


def test_names_of_files_stay_inside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.png").write_bytes(_png(1))
    columns = {"image": ["a.png", "a.png", "gone.png"], "caption": ["a", "b", "c"]}
    Dataset.from_dict(columns).to_parquet(str(tmp_path / "data/train.parquet"))
    loaded = load_source("hub", str(tmp_path / "data"))
    assert loaded.splits["train"]["captions"][:] == [["a", "b"]]
    assert loaded.splits["train"][0]["image"]["path"] == str(tmp_path / "data/a.png")
    assert tuple(map(str, loaded.notes)) == ("1 photo named in the caption file does not exist: gone.png",)
    columns["image"][2] = "../../etc/passwd"
    Dataset.from_dict(columns).to_parquet(str(tmp_path / "data/train.parquet"))
    assert "row 2: '../../etc/passwd': is no plain file name" in _mistakes(str(tmp_path / "data"))[0]


@pytest.mark.parametrize(
    ("path", "complaint"), [("/etc/passwd", "outside the data set"), (None, "the row has no image")]
)
def test_paths_a_stranger_wrote_are_refused(tmp_path: Path, path: str | None, complaint: str) -> None:
    cell = pa.array([{"bytes": None, "path": path}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": cell, "caption": ["a"]}), tmp_path / "data/train.parquet")
    (mistake,) = _mistakes(str(tmp_path / "data"))
    assert complaint in mistake


def test_hub_data_pickles_without_its_images(tmp_path: Path) -> None:
    path = _save(tmp_path, train=_table(40, captions=[["a"]] * 40))
    table = load_source("hub", path).splits["train"]
    again = pickle.loads(pickle.dumps(table))
    assert again[39] == table[39]
    assert _png(39) not in pickle.dumps(table)


def test_doubled_ids_are_refused(tmp_path: Path) -> None:
    lists = _table(2, captions=[["a"], ["b"]], image_id=["x", "x"])
    assert "row 1: the image is in row 0 too" in _mistakes(_save(tmp_path / "one", train=lists))[0]
    train, test = (_table(1, captions=[["a"]], image_id=["x"]) for _ in range(2))
    assert "an image belongs to one split" in _mistakes(_save(tmp_path / "two", train=train, test=test))[0]


def test_a_data_set_without_splits_has_no_image(tmp_path: Path) -> None:
    path = _save(tmp_path)
    assert _mistakes(path) == (f"{path}: no image with captions in any split",)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in _mistakes(str(tmp_path))[0]
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    assert "expected what `save_to_disk` wrote" in _mistakes(str(tmp_path))[0]


def test_hub_out_of_reach_is_one_line_with_advice(tmp_path: Path) -> None:
    program = (
        "from capdist.errors import run_program\n"
        "from capdist.data.sources import load_source\n"
        "raise SystemExit(run_program(lambda: load_source('hub', 'nobody/nothing')))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 5
    (line,) = done.stderr.strip().splitlines()
    assert "nobody/nothing: the hub cannot be reached" in line
    assert "give a local folder" in line
