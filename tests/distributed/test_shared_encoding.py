"""The encoder pass in real processes: killed, stopped and shared out, it ends with the store of a pass in one go."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from capdist.commands.features import fill_cache
from capdist.recipe.reading import load_recipe
from tests.conftest import draw_photos
from tests.processes import REPOSITORY, SMALL, check_finished, launch, run

pytestmark = pytest.mark.slow

SCRIPT = REPOSITORY / "tests" / "distributed" / "scripts" / "features_with_fault.py"
RECIPE = ("--config", "configs/scenes.yaml")


def present(stdout: str) -> dict[str, tuple[int, int]]:
    """Return the photos of each split, and how many of them were there already, from the lines of the command."""
    lines = re.findall(r"^(\w+): (\d+) photos, (\d+) were there already, ", stdout, re.MULTILINE)
    assert len(lines) == len(stdout.splitlines()), stdout
    return {split: (int(rows), int(found)) for split, rows, found in lines}


def stores(output_dir: Path) -> dict[str, np.ndarray]:
    """Return the rows that are done of every store, by name and row."""
    rows = {}
    for folder in (output_dir / ".features").glob("[!.]*/"):
        features, done = np.load(folder / "features.npy"), np.load(folder / "done.npy")
        rows |= {f"{folder.name}/{row}": features[row] for row in np.flatnonzero(done)}
    return rows


def check_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Compare with a pass whose batches were others: the last bit of a sum may differ."""
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=2e-3, atol=2e-3, err_msg=name)


@pytest.mark.usefixtures("fresh_accelerate")
def test_killed_stopped_and_shared_out_is_as_in_one_go(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos", {"train": 30, "validation": 5})
    overrides = [*SMALL, "encoder.trainable_from=null", "encoder.batch_norm=frozen", "encoder.batch_size=4"]
    overrides += [f"data.path={photos}"]
    fill_cache(load_recipe(RECIPE[1], [*overrides, f"run.output_dir={tmp_path / 'straight'}"]))
    expected = stores(tmp_path / "straight")
    assert len(expected) == 35
    arguments = [*RECIPE, *overrides, f"run.output_dir={tmp_path / 'runs'}"]

    killed = run([str(SCRIPT), *arguments], FAULTS="kill:0:3", ACCELERATE_USE_CPU="true")
    assert killed.returncode == -9
    found = stores(tmp_path / "runs")
    assert len(found) == 8
    check_same(found, expected)

    # 22 are left for two processes. Rank 0 encodes 4 + 4, rank 1 only its first 4; of the last 10 each encodes 4.
    faults = {"FAULTS": "error:1:2 term:1:1 none", "CODES": str(tmp_path / "codes")}
    shared = launch(SCRIPT, arguments, processes=2, **faults)
    check_finished(shared)
    assert [(tmp_path / f"codes_{rank}").read_text().split() for rank in range(2)] == [["3", "143", "0"]] * 2
    assert shared.stderr.count("capdist: error: photo.jpg: broken") == 2
    assert shared.stderr.count("the same command goes on from there") == 2
    for present_before in (8, 20, 28):
        assert shared.stderr.count(f"features of train: {present_before} of 30 are in") == 1
    assert present(shared.stdout) == {"train": (30, 28), "validation": (5, 0)}
    found = stores(tmp_path / "runs")
    assert found.keys() == expected.keys()
    check_same(found, expected)
