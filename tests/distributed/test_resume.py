"""A run that is stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.processes import REPOSITORY, SMALL, check_finished, launch

pytestmark = pytest.mark.slow

SCRIPT = REPOSITORY / "tests" / "distributed" / "scripts" / "train_with_fault.py"
RANDOM = (
    "data.num_workers=2", "data.random_crop=0.6", "data.horizontal_flip=true", "data.color_jitter=0.3",
    "data.captions_per_image=2", "decoder.dropout=0.3", "encoder.trainable_from=all", "encoder.batch_norm=train",
    "training.max_steps=20", "training.epochs=100", "training.log_every=1",
)  # fmt: skip
"""Everything that draws random numbers, on."""


def train(photos: Path, folder: Path, *more: str, processes: int = 1, fault: str = "none:0") -> int:
    arguments = ["--config", "configs/scenes.yaml", *SMALL, *RANDOM, f"data.path={photos}"]
    arguments += [f"run.output_dir={folder}", "run.name=run", *more]
    result = launch(SCRIPT, arguments, processes=processes, FAULT=fault)
    if fault.startswith(("none", "forget")):
        check_finished(result)
    return result.returncode


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of the last checkpoint's weights and optimizer state."""
    checkpoint = folder / "run" / "checkpoints" / "step_00000020"
    names = ("model.safetensors", "optimizer.safetensors")
    assert all(len(load_file(checkpoint / name)) > 10 for name in names)
    return {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}


def training_lines(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def straight(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train(photos, folder)
    return folder


@pytest.mark.parametrize("processes", [1, 3])  # two: test_stages.py
def test_stopped_and_resumed_equals_uninterrupted(photos: Path, straight: Path, tmp_path: Path, processes: int) -> None:
    if processes > 1:
        straight = tmp_path / "straight"
        train(photos, straight, processes=processes)
    start = json.loads((straight / "run" / "log.jsonl").read_text().splitlines()[0])
    assert start["num_processes"] == processes
    resumed = tmp_path / "resumed"
    assert train(photos, resumed, processes=processes, fault="term:7") != 0
    assert [path.name for path in (resumed / "run" / "checkpoints").iterdir()] == ["step_00000007"]
    train(photos, resumed, "--resume", processes=processes)
    assert digests(resumed) == digests(straight)
    assert training_lines(resumed) == training_lines(straight)


def test_killed_between_checkpoints_equals_uninterrupted(photos: Path, straight: Path, tmp_path: Path) -> None:
    assert train(photos, tmp_path, "checkpoint.every_steps=3", fault="vanish:9") != 0
    train(photos, tmp_path, "checkpoint.every_steps=3", "--resume")
    assert digests(tmp_path) == digests(straight)
    assert training_lines(tmp_path) == training_lines(straight)


@pytest.fixture(scope="module")
def stopped(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    assert train(photos, folder, fault="term:7") != 0
    return folder


@pytest.mark.parametrize("forgotten", ["model", "optimizer", "step"])
def test_forgetting_one_thing_is_noticed(
    photos: Path, straight: Path, stopped: Path, tmp_path: Path, forgotten: str
) -> None:
    """The negative control: the equality above would notice if one part were not restored."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    train(photos, tmp_path, "--resume", fault=f"forget:{forgotten}")
    assert digests(tmp_path) != digests(straight)


def test_other_number_of_processes_is_refused(photos: Path, stopped: Path) -> None:
    arguments = ["--config", "configs/scenes.yaml", *SMALL, *RANDOM, f"data.path={photos}"]
    arguments += [f"run.output_dir={stopped}", "run.name=run", "--resume"]
    result = launch(SCRIPT, arguments, processes=2)
    assert result.returncode != 0
    assert "was made by 1 processes, now 2" in result.stderr
