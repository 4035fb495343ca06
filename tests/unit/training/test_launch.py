"""What a launch takes of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from capdist.distributed import launch
from capdist.errors import UsageError
from capdist.recipe.reading import load_recipe
from tests.conftest import reset_accelerate

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_a_processor_is_not_said_to_compute_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UsageError, match="mixed_precision: fp16 needs a GPU"):
        launch.build_accelerator(load_recipe("configs/scenes.yaml", ["training.mixed_precision=fp16"]))
    reset_accelerate()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UsageError, match="mixed_precision: fp16 needs a GPU"):
        launch.build_accelerator()


@pytest.mark.parametrize(
    ("share", "threads"),
    [("max 100000", 8), ("300000 100000", 3), ("50000 100000", 1), ("1600000 100000", 8), ("nonsense", 8), (None, 8)],
)
def test_a_container_gets_no_more_threads_than_its_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share: str | None, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(launch, "CPU_QUOTA", tmp_path / "cpu.max")
    if share is not None:
        (tmp_path / "cpu.max").write_text(f"{share}\n")
    launch.build_accelerator(load_recipe("configs/scenes.yaml"))
    assert torch.get_num_threads() == threads
    launch.build_accelerator(load_recipe("configs/scenes.yaml", ["run.threads=2"]))
    assert torch.get_num_threads() == 2
