"""What holds for every source: the choice of it, its settings, and what becomes of a loaded data set."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

import pytest

from capdist.data.sources import SOURCES, LoadedData, load_source
from capdist.errors import DataError, UsageError


def _ids(loaded: LoadedData) -> dict[str, list[str]]:
    return {split: table["image_id"][:] for split, table in loaded.splits.items()}


def test_unknown_source_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="'flickr8' is unknown; did you mean 'flickr8k'"):
        load_source("flickr8", "x")


@pytest.mark.parametrize("source", sorted(set(SOURCES) - {"scenes"}))
def test_every_other_source_needs_a_path_that_exists(source: str) -> None:
    with pytest.raises(UsageError, match="needs data.path"):
        load_source(source)
    with pytest.raises(DataError, match="/no/such/place: the folder does not exist; expected"):
        load_source(source, "/no/such/place")


def test_settings_without_meaning_are_refused() -> None:
    with pytest.raises(UsageError, match="data.path 'x' has no meaning"):
        load_source("scenes", "x")
    with pytest.raises(UsageError, match="has no columns to choose, but 'c'"):
        load_source("scenes", captions_column="c")
    with pytest.raises(UsageError, match="data.limit is 0"):
        load_source("scenes", limit=0)


def test_scenes_are_embedded_and_limited() -> None:
    loaded = load_source("scenes", limit=3)
    assert {split: len(table) for split, table in loaded.splits.items()} == {"train": 3, "validation": 3, "test": 3}
    row = loaded.splits["train"][2]
    assert row["image_id"] == "scene_train_00002"
    assert row["image"]["path"] is None
    assert row["image"]["bytes"].startswith(b"\x89PNG")
    assert len(row["captions"]) == 5
    assert loaded.notes == ()


def test_loaded_data_reaches_a_spawned_worker() -> None:
    loaded = load_source("scenes", limit=2)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_ids, (loaded,)) == _ids(loaded)


def test_importing_the_sources_is_cheap() -> None:
    heavy = "import sys, capdist.data.sources; print([m for m in ('datasets', 'torch', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
