"""Several processes do what one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import draw_photos
from tests.processes import SMALL, TRAIN, check_finished, launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("seven") / "data", {"train": 7, "validation": 3})


def weights_after_five_steps(
    photos: Path, folder: Path, *, processes: int, batch_size: int, accumulation: int
) -> dict[str, torch.Tensor]:
    arguments = ["--config", "configs/scenes.yaml", *SMALL, f"data.path={photos}", f"run.output_dir={folder}"]
    arguments += ["run.name=run", f"data.batch_size={batch_size}", f"training.accumulation={accumulation}"]
    # No dropout: masks are drawn by each process. BatchNorm frozen: its statistics are of a process's own images.
    arguments += ["decoder.dropout=0.0", "encoder.trainable_from=all", "encoder.batch_norm=frozen"]
    arguments += [
        "data.captions_per_image=3",
        "training.max_steps=5",
        "training.epochs=50",
        "training.word_presence=0.3",
    ]
    check_finished(launch(TRAIN, arguments, processes=processes))
    start = json.loads((folder / "run" / "log.jsonl").read_text().splitlines()[0])
    assert start["num_processes"] == processes
    return load_file(folder / "run" / "checkpoints" / "step_00000005" / "model.safetensors")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_as_one(seven: Path, tmp_path: Path, accumulation: int) -> None:
    two = weights_after_five_steps(seven, tmp_path / "two", processes=2, batch_size=4, accumulation=accumulation)
    one = weights_after_five_steps(seven, tmp_path / "one", processes=1, batch_size=8 * accumulation, accumulation=1)
    assert two.keys() == one.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_evaluation_does_not_depend_on_processes(photos: Path, tmp_path: Path) -> None:
    """101 images, so that two processes have an uneven share."""
    many = draw_photos(tmp_path / "many", {"test": 101})
    arguments = ["--config", "configs/scenes.yaml", *SMALL, f"data.path={photos}", f"run.output_dir={tmp_path}"]
    arguments += ["run.name=run", "training.epochs=2", "encoder.trainable_from=all"]
    check_finished(launch(TRAIN, arguments))
    results = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.json"
        command = ["evaluate", str(tmp_path / "run" / "model"), "--source", "folder", "--path", str(many)]
        command += ["--split", "test", "--batch-size", "16", "--output", str(output)]
        check_finished(launch(TRAIN.with_name("cli.py"), command, processes=processes))
        results.append(json.loads(output.read_text()))
    one, two = results
    assert len({row["image_id"] for row in one["captions"]}) == 101
    assert len(one["captions"]) == one["settings"]["num_images"] == 101
    assert two == one
    assert one["metrics"]["bleu_1"] > 0
