"""Self-critical runs as a whole: on-policy whatever the recipe's dropout, and refused without what they need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from capdist.inference import report
from capdist.recipe_file import load_recipe
from capdist.train import train
from tests.conftest import draw_photos, reset_accelerate
from tests.processes import SMALL

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Train a run on six photos and return its folder and its last weights."""
    monkeypatch.setattr(report, "final_report", lambda *rest: ("none", {}))  # takes longer than all the rest
    photos = draw_photos(tmp_path / "photos", {"train": 6, "validation": 2})
    frozen = ("encoder.trainable_from=null", "encoder.batch_norm=frozen", "training.warmup_steps=0")

    def train_run(name: str, *more: str) -> tuple[Path, dict[str, torch.Tensor]]:
        reset_accelerate()
        places = (f"data.path={photos}", f"run.output_dir={tmp_path}", f"run.name={name}")
        result = train([load_recipe("configs/scenes.yaml", [*SMALL, *frozen, *places, *more])])
        checkpoint = result.folder / "checkpoints" / f"step_{result.steps:08d}"
        return result.folder, load_file(checkpoint / "model.safetensors")

    return train_run


def test_samples_are_learned_by_the_network_that_drew_them(run) -> None:  # type: ignore[no-untyped-def]
    start, _ = run("start", "training.max_steps=1")
    scst = ("training.stage=scst", "training.max_steps=2", f"training.start_from={start / 'model'}")
    _, plain = run("plain", *scst, "decoder.dropout=0.0")
    _, dropped = run("dropped", *scst, "decoder.dropout=0.5", "decoder.state_dropout=0.5")
    _, other = run("other", *scst, "decoder.dropout=0.0", "scst.samples=4")
    assert all(torch.equal(tensor, dropped[name]) for name, tensor in plain.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in plain.items())
