"""Halves of the validation split: by a rule that anyone can follow, apart, and used for what they are for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from capdist.data.splits import get_split, get_splits, prepare, read_source
from capdist.errors import DataError
from capdist.recipe.sections import DataSection, Recipe
from tests.conftest import draw_photos


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("halves") / "data", {"train": 4, "validation": 11})


def _data(folder: Path) -> DataSection:
    return DataSection(source="folder", path=str(folder))


def test_halves_follow_the_order_of_the_digests_of_their_ids(folder: Path) -> None:
    loaded = read_source(_data(folder))
    whole, choose, report = (get_split(loaded, name) for name in ("dev", "dev-choose", "dev-report"))
    in_order = sorted(whole.image_ids, key=lambda image_id: hashlib.sha256(image_id.encode()).hexdigest())
    assert set(choose.image_ids) == set(in_order[0::2])
    assert set(report.image_ids) == set(in_order[1::2])
    assert (len(choose.image_ids), len(report.image_ids)) == (6, 5)
    assert (choose.name, report.name) == ("validation-choose", "validation-report")
    by_id = dict(zip(whole.image_ids, whole.references, strict=True))
    for half in (choose, report):
        assert [list(captions) for captions in half.references] == [list(by_id[i]) for i in half.image_ids]
        assert all(i in str(photo["path"]) for i, photo in zip(half.image_ids, half.photos, strict=True))
        assert list(half.image_ids) == [i for i in whole.image_ids if i in half.image_ids], "in the order of the source"


def test_a_recipe_chooses_on_one_half_and_reports_the_other(folder: Path) -> None:
    for halve, names in ((True, ("validation-choose", "validation-report")), (False, ("validation", "validation"))):
        data = prepare(Recipe(data=_data(folder), evaluation={"halve_validation": halve}))
        assert data.choosing is not None
        assert data.reporting is not None
        assert (data.choosing.name, data.reporting.name) == names


def test_a_test_split_is_what_is_reported(photos: Path) -> None:
    data = prepare(Recipe(data=_data(photos), evaluation={"halve_validation": True}))
    assert data.choosing is not None
    assert data.reporting is not None
    assert (data.choosing.name, data.reporting.name) == ("validation-choose", "test")


def test_without_validation_there_is_nothing_to_halve(tmp_path: Path) -> None:
    loaded = read_source(_data(draw_photos(tmp_path / "data", {"train": 3, "test": 2})))
    assert list(get_splits(loaded, halve_validation=True)) == ["train", "test"]
    with pytest.raises(DataError, match="no split 'validation'; it has train, test"):
        get_split(loaded, "dev-report")


@pytest.mark.parametrize(("word", "name"), [("training", "train"), ("valid", "validation"), ("val", "validation")])
def test_splits_answer_to_the_words_that_sources_know_them_by(folder: Path, word: str, name: str) -> None:
    assert get_split(read_source(_data(folder)), word).name == name
