"""What a benchmark measures: whose photos, and how the textbook's epoch follows from its step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from capdist.benchmark.encoding import load_input
from capdist.benchmark.measure import Timing
from capdist.benchmark.report import Row, Table
from capdist.benchmark.training import TEXTBOOK_BATCH, textbook_epoch
from capdist.commands.benchmark import _check
from capdist.data.images import Preprocessing
from capdist.errors import CapdistError, DataError, UsageError
from capdist.recipe.sections import Recipe


def _input(**data: Any) -> Table:
    recipe = Recipe(data={"image_size": 32, **data})
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    work: Any = SimpleNamespace(
        recipe=recipe, accelerator=accelerator, preprocessing=Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    )
    return load_input(work, num_photos=4, repeats=1, with_textbook=False)


@pytest.mark.parametrize("name", ["train-step", "epoch"])
@pytest.mark.parametrize("training", [{"objective": "scst"}, {"word_presence": 1.0}])
def test_steps_that_would_not_be_the_recipes_are_not_measured(name: str, training: dict[str, Any]) -> None:
    _check([name], Recipe(), None, True)
    with pytest.raises(UsageError, match="measure training.objective=cross_entropy"):
        _check([name], Recipe(training=training), None, True)
    _check(["caption"], Recipe(training=training), None, True)


def test_without_a_path_photos_are_made_up_and_called_so() -> None:
    table = _input()
    assert table.rows[-1].units == 4
    assert table.facts["photos"] == "4 made up, 500x375 pixels"


def test_photos_of_a_path_are_read_and_named(photos: Path) -> None:
    table = _input(source="folder", path=str(photos))
    assert table.rows[-1].units == 4
    assert table.facts["photos"] == f"4 of folder, {photos}, train split"


@pytest.mark.parametrize(
    ("source", "error"), [("folder", DataError), ("flickr8k", DataError), ("hub", DataError), ("scenes", UsageError)]
)
def test_a_path_that_cannot_be_read_ends_a_benchmark_as_it_ends_training(
    source: str, error: type[CapdistError], tmp_path: Path
) -> None:
    with pytest.raises(error, match="nowhere"):
        _input(source=source, path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_an_epoch_of_the_textbook_goes_at_the_rate_of_its_step(num_processes: int) -> None:
    """Every process takes a step of its own at the same time, so that all of them share the epoch's captions."""
    timing = Timing((2.0, 3.0, 2.5), 0)
    step = Row.of("textbook", timing, float(TEXTBOOK_BATCH * num_processes), num_processes)
    epoch = textbook_epoch(timing, 30_000.0, num_processes)
    assert epoch.units == 30_000
    assert epoch.per_second == pytest.approx(step.per_second)
    assert epoch.seconds == pytest.approx(2.5 * 30_000 / 32 / num_processes)
    assert epoch.num_processes == num_processes
