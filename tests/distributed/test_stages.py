"""A recipe in stages, stopped in its second one and resumed, ends with the same bits as one that was not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.processes import REPOSITORY, SMALL, TRAIN, check_finished, launch

pytestmark = pytest.mark.slow

SCRIPT = REPOSITORY / "tests" / "distributed" / "scripts" / "train_with_fault.py"
RECIPE = """
data: {horizontal_flip: true, num_workers: 1}
encoder: {cache_views: 2}
decoder: {dropout: 0.3}
evaluation: {halve_validation: true}
training: {epochs: 100, log_every: 1, ema_decay: 0.8}
stages:
  words:
    training: {max_steps: 3}
  reward:
    training: {max_steps: 6, objective: scst, learning_rate: 1e-3}
    scst: {samples: 3, bleu_weight: 0.5, cross_entropy_weight: 0.1}
"""
"""Everything that has a state of its own, on; the first stage is over before a fault at step 5."""


def _train(photos: Path, folder: Path, *more: str, fault: str = "none:0") -> int:
    folder.mkdir(exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    arguments = ["--config", str(recipe), *SMALL, f"data.path={photos}", f"run.output_dir={folder}", "run.name=run"]
    result = launch(SCRIPT, [*arguments, *more], processes=2, FAULT=fault)
    if fault.startswith(("none", "forget")):
        check_finished(result)
    return result.returncode


def _digests(folder: Path) -> dict[str, str]:
    checkpoint = folder / "run" / "checkpoints" / "step_00000006"
    names = ("model.safetensors", "optimizer.safetensors", "average.safetensors")
    return {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}


def _lines(folder: Path, run: str = "run") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    _train(photos, folder)
    return folder


@pytest.fixture(scope="module")
def stopped(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    assert _train(photos, folder, fault="term:5") != 0
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())[-1] == "step_00000005"
    return folder


def _copy(stopped: Path, folder: Path) -> Path:
    return Path(shutil.copytree(stopped, folder / "copy"))


def test_each_stage_is_a_run_that_starts_from_the_one_before(straight: Path) -> None:
    words = [line for line in _lines(straight, "run-words") if "loss" in line]
    rewards = [line for line in _lines(straight) if "loss" in line]
    assert [line["step"] for line in words] == [1, 2, 3]
    assert [line["step"] for line in rewards] == [1, 2, 3, 4, 5, 6]
    assert not any("reward" in line for line in words)
    assert all(0 <= line["reward"] <= 10.5 for line in rewards)
    for run in ("run-words", "run"):
        assert (straight / run / "model" / "model.safetensors").exists()
        assert {line.get("split") for line in _lines(straight, run)} == {None, "validation-choose", "test"}
    assert "start_from: " + str(straight / "run-words" / "model") in (straight / "run" / "config.yaml").read_text()


def test_stopped_in_the_second_stage_and_resumed(photos: Path, straight: Path, stopped: Path, tmp_path: Path) -> None:
    resumed = _copy(stopped, tmp_path)
    first_stage = (resumed / "run-words" / "model" / "model.safetensors").read_bytes()
    _train(photos, resumed, "--resume")
    assert (resumed / "run-words" / "model" / "model.safetensors").read_bytes() == first_stage
    assert _digests(resumed) == _digests(straight)
    kept = ("step", "loss", "reward")
    told = [[{k: line[k] for k in kept} for line in _lines(f) if "loss" in line] for f in (resumed, straight)]
    assert told[0] == told[1]


def test_an_average_that_is_not_restored_is_noticed(
    photos: Path, straight: Path, stopped: Path, tmp_path: Path
) -> None:
    forgetful = _copy(stopped, tmp_path)
    _train(photos, forgetful, "--resume", fault="forget:average")
    found, expected = _digests(forgetful), _digests(straight)
    assert found["average.safetensors"] != expected["average.safetensors"]
    assert found["model.safetensors"] == expected["model.safetensors"]


def test_a_stage_whose_folder_is_taken_stops_the_run_before_the_first_stage(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("{}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    arguments = ["--config", str(recipe), *SMALL, f"data.path={photos}", f"run.output_dir={tmp_path}", "run.name=run"]
    result = launch(TRAIN, arguments)
    assert result.returncode != 0
    assert f"{tmp_path}/run: already holds a run" in result.stderr
    assert not (tmp_path / "run-words").exists()
