"""The wheel, installed where there is no checkout: its commands work in an empty folder, recipes by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.processes import REPOSITORY, check_finished

pytestmark = pytest.mark.slow

pytest.importorskip("hatchling", reason="the wheel is built without a network, by what is installed")


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the wheel, which finds every other package in the one that tests."""
    folder = tmp_path_factory.mktemp("wheel")
    offline = ("--quiet", "--no-deps", "--no-index")
    python("-m", "pip", "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(folder), str(REPOSITORY))
    (wheel,) = folder.glob("capdist-*.whl")
    python("-m", "venv", "--without-pip", str(folder / "venv"))
    environment = folder / "venv" / "bin" / "python"
    python("-m", "pip", "--python", str(environment), "install", *offline, str(wheel))
    (packages,) = (folder / "venv").glob("lib/*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return environment.parent


def run(program: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # Without Java, whose METEOR takes longer than all the rest.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": str(folder)}
    return subprocess.run(
        [str(program), *arguments],
        capture_output=True, text=True, timeout=240, cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "COLUMNS": "80"},
    )  # fmt: skip


def test_the_wheel_is_what_runs(programs: Path, tmp_path: Path) -> None:
    where = run(programs / "python", "-c", "import capdist; print(capdist.__file__)", folder=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(programs.parent)


def test_a_recipe_by_name_trains_in_an_empty_folder(programs: Path, tmp_path: Path) -> None:
    arguments = ("training.max_steps=2", "training.warmup_steps=0", "data.limit=20", "run.threads=1")
    check_finished(run(programs / "capdist", "train", "--config", "scenes", *arguments, folder=tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "runs/scenes/log.jsonl").read_text().splitlines()]
    assert lines[-1]["split"] == "test"
    assert lines[-1]["step"] == 2


def test_the_package_is_a_program(programs: Path, tmp_path: Path) -> None:
    result = run(programs / "python", "-m", "capdist", "--help", folder=tmp_path)
    check_finished(result)
    assert result.stdout.startswith("Usage: capdist [OPTIONS] COMMAND")


def test_keys_are_described(programs: Path, tmp_path: Path) -> None:
    result = run(programs / "capdist", "keys", "training", folder=tmp_path)
    check_finished(result)
    assert "training.learning_rate  [default: 0.001]" in result.stdout.splitlines()


def test_a_path_of_a_checkout_means_the_shipped_recipe(programs: Path, tmp_path: Path) -> None:
    result = run(programs / "capdist", "train", "--config", "configs/flickr8k.yaml", folder=tmp_path)
    said, mistake = result.stderr.splitlines()
    assert "configs/flickr8k.yaml: no such file here; taking the shipped recipe, " in said
    assert mistake.startswith("capdist: error: ")
    assert "data/flickr8k" in mistake
    assert result.returncode == 3
