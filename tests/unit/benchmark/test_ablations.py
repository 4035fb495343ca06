"""The table of ablations: means and deviations of the rows it names, and no score under another row's name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.processes import REPOSITORY, run


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablations", REPOSITORY / "benchmarks" / "ablations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _score(output: Path, name: str, settings: str, cider: float) -> None:
    (output / name).mkdir(parents=True)
    (output / f"{name}.settings").write_text(f"recipe.yaml\ntraining.epochs=5\n{settings}".strip())
    metrics = {"bleu_1": 0.6, "bleu_4": 0.2, "cider": cider}
    (output / name / "dev-report.json").write_text(json.dumps({"metrics": metrics}))


def test_rows_are_means_and_deviations_of_the_seeds_there_are(ablations: ModuleType, tmp_path: Path) -> None:
    for seed, cider in enumerate((0.4, 0.5, 0.6)):
        _score(tmp_path, f"base-{seed}", "", cider)
    _score(tmp_path, "no_gate-0", "decoder.gate=false", 0.45)
    (tmp_path / "no_gate-1").mkdir()  # begun
    table = ablations.table({"base": [], "no gate": ["decoder.gate=false"], "later": ["a.b=c"]}, tmp_path, [0, 1, 2])
    assert table.splitlines()[2:] == [
        "| base |  | 3 | 0.6000 ± 0.0000 | 0.2000 ± 0.0000 | 0.5000 ± 0.1000 |",
        "| no gate | `decoder.gate=false` | 1 | 0.6000 | 0.2000 | 0.4500 |",
    ]


def test_a_score_is_not_taken_for_that_of_other_settings(tmp_path: Path) -> None:
    _score(tmp_path / "runs", "no_gate-0", "decoder.gate=false", 0.45)
    (tmp_path / "rows.yaml").write_text("no gate: [decoder.gate=true]\n")
    places = [str(tmp_path / "rows.yaml"), "--output-dir", str(tmp_path / "runs"), "--seeds", "0"]
    for more in (["--table"], ["--config", "configs/scenes.yaml"]):
        result = run(["benchmarks/ablations.py", *places, *more])
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith(f"{tmp_path}/runs/no_gate-0: was trained with other settings")


def test_a_run_that_fails_is_told_by_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text("base: []\n")
    places = ["--config", "configs/scenes.yaml", "--output-dir", str(tmp_path / "runs"), "--seeds", "0"]
    result = run(["benchmarks/ablations.py", str(tmp_path / "rows.yaml"), "encoder.name=resnet1", *places])
    assert result.returncode == 1
    assert "base-0: failed, see" in result.stdout
