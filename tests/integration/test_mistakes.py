"""Twenty ways to get a recipe wrong: exit code, one helpful line a mistake, no traceback, by both ways to start."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes import SMALL, TRAIN, run

pytestmark = pytest.mark.slow

# What is wrong, the exit code, and what the line must say: what was found, and what would be right.
MISTAKES: dict[str, tuple[list[str], int, tuple[str, ...]]] = {
    "misspelt key": (
        ["training.learning_rte=1"],
        2,
        ("training.learning_rte", "did you mean 'training.learning_rate'"),
    ),
    "misspelt section": (["trainign.epochs=1"], 2, ("trainign", "did you mean 'training'")),
    "key of another section": (["training.batch_size=8"], 2, ("did you mean 'data.batch_size'",)),
    "text for a number": (["training.epochs=many"], 2, ("training.epochs", "integer", "'many'")),
    "fraction for a whole number": (["data.batch_size=1.5"], 2, ("data.batch_size", "1.5")),
    "boolean for a number": (["decoder.hidden_size=true"], 2, ("decoder.hidden_size", "True")),
    "impossible batch": (["data.batch_size=0"], 2, ("data.batch_size", "greater than or equal to 1")),
    "impossible dropout": (["decoder.dropout=1.5"], 2, ("decoder.dropout", "less than 1")),
    "too many captions": (["data.captions_per_image=6"], 2, ("data.captions_per_image", "less than or equal to 5")),
    "unknown choice": (["training.optimizer=sgd"], 2, ("'adam' or 'adamw'", "'sgd'")),
    "not an override": (["training.epochs"], 2, ("'training.epochs'", "section.key=value")),
    "name that is a path": (["run.name=../elsewhere"], 2, ("run.name", "'../elsewhere'")),
    "tied weights that do not fit": (["decoder.tie_weights=true"], 2, ("embed_size", "16 and 24")),
    "folder not given": (["data.path=null"], 2, ("data.path", "needs a folder")),
    "no such recipe": (["--config", "nowhere.yaml"], 2, ("nowhere.yaml", "no such recipe")),
    "unknown source": (["data.source=flickr8"], 2, ("data.source", "flickr8k")),
    "unknown encoder": (["encoder.name=resnet55"], 2, ("encoder.name", "'resnet50'")),
    "unknown block": (["encoder.trainable_from=layer9"], 2, ("encoder.trainable_from", "layer1")),
    "no weights file": (["encoder.weights=nowhere.pth"], 2, ("nowhere.pth", "no such file")),
    "missing folder": (["data.path=nowhere"], 3, ("nowhere",)),
    "no captions left": (["text.min_frequency=100000"], 3, ("text.min_frequency", "lower it")),
    "foreign weights": (["encoder.weights={weights}"], 4, ("check encoder.name",)),
}


def start(way: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    program = [str(TRAIN)] if way == "file" else ["-m", "capdist.cli", "train"]
    return run([*program, *arguments], ACCELERATE_USE_CPU="true")


@pytest.fixture(scope="module")
def results(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], object]:
    """Start all of them, two at a time."""
    import torch

    folder = tmp_path_factory.mktemp("mistakes")
    torch.save({"some.weight": torch.zeros(3)}, folder / "foreign.pth")
    common = [
        *SMALL,
        f"data.path={photos}",
        f"run.output_dir={folder}",
        "training.max_steps=1",
        "training.warmup_steps=0",
    ]

    def attempt(job: tuple[str, str]) -> subprocess.CompletedProcess[str]:
        name, way = job
        wrong = [argument.format(weights=folder / "foreign.pth") for argument in MISTAKES[name][0]]
        recipe = [] if "--config" in wrong else ["--config", "configs/scenes.yaml"]
        return start(way, [*recipe, *common, f"run.name=run_{way}", *wrong])

    jobs = [(name, way) for name in MISTAKES for way in ("file", "command")]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(attempt, jobs), strict=True))


@pytest.mark.parametrize("way", ["file", "command"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_its_code_and_one_helpful_line(
    results: dict[tuple[str, str], subprocess.CompletedProcess[str]], name: str, way: str
) -> None:
    result, (_, code, words) = results[name, way], MISTAKES[name]
    assert result.returncode == code, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("capdist: error: ")]
    assert len(lines) == 1, result.stderr[-3000:]
    assert result.stderr.splitlines()[-1] == lines[0]
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("way", ["file", "command"])
def test_all_mistakes_of_a_recipe_at_once(tmp_path: Path, way: str) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("run:\n  sed: 3\ndata:\n  source: scenes\n  batch_size: -1\ntraning:\n  epochs: 1\n")
    result = start(way, ["--config", str(recipe), "decoder.dropout=2"])
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("capdist: error: ")]
    assert len(lines) == 4
    text = "\n".join(lines)
    for place in (f"{recipe}:2: run.sed", f"{recipe}:5: data.batch_size", f"{recipe}:6: traning", "decoder.dropout"):
        assert place in text


def test_an_existing_run_is_not_overwritten(photos: Path, tmp_path: Path) -> None:
    arguments = ["--config", "configs/scenes.yaml", *SMALL, f"data.path={photos}", f"run.output_dir={tmp_path}"]
    arguments += ["training.max_steps=1"]
    assert start("file", arguments).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = start("file", arguments)
    assert again.returncode == 2
    assert "--resume" in again.stderr.splitlines()[-1]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"} == {
        p: time for p, time in before.items() if p.name != ".lock"
    }


def test_a_broken_photo_is_named(photos: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    broken = folder / "train_0003.png"
    broken.write_bytes(broken.read_bytes()[:60])
    arguments = [
        "--config",
        "configs/scenes.yaml",
        *SMALL,
        f"data.path={folder}",
        f"run.output_dir={tmp_path / 'runs'}",
    ]
    for more in (["encoder.trainable_from=all", "data.num_workers=2"], ["encoder.cache=auto"]):
        result = start("file", [*arguments, *more, f"run.name={len(more)}"])
        assert result.returncode == 3, result.stderr[-3000:]
        assert "train_0003.png" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
