"""The table of ablations: means and deviations of the rows it names, and no score under another row's name."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from capdist.errors import UsageError
from capdist.recipe.reading import load_recipe, save_recipe
from capdist.recipe.rules import rules_of
from capdist.recipe.sections import Recipe, section_classes
from tests.processes import REPOSITORY, run


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablations", REPOSITORY / "experiments" / "ablations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _score(output: Path, name: str, changes: Sequence[str], cider: float, epochs: int = 5) -> None:
    overrides = [f"training.epochs={epochs}", "evaluation.halve_validation=true", f"run.seed={name[-1]}", *changes]
    folder = output / name
    folder.mkdir(parents=True)
    save_recipe(load_recipe("configs/scenes.yaml", overrides), folder / "config.yaml")
    metrics = {"bleu_1": 0.6, "bleu_4": 0.2, "cider": cider}
    (folder / "dev-report.json").write_text(json.dumps({"metrics": metrics}))


def test_rows_are_means_and_deviations_of_the_seeds_there_are(ablations: ModuleType, tmp_path: Path) -> None:
    for seed, cider in enumerate((0.4, 0.5, 0.6)):
        _score(tmp_path, f"base-{seed}", [f"training.start_from=elsewhere/{seed}"], cider)
    _score(tmp_path, "gate-0", ["decoder.gate=true"], 0.45)
    (tmp_path / "gate-1").mkdir()  # begun
    table = ablations.table({"base": [], "gate": ["decoder.gate=true"], "later": ["a.b=c"]}, tmp_path, [0, 1, 2])
    assert table.splitlines()[2:] == [
        "| base |  | 3 | 0.6000 ± 0.0000 | 0.2000 ± 0.0000 | 0.5000 ± 0.1000 |",
        "| gate | `decoder.gate=true` | 1 | 0.6000 | 0.2000 | 0.4500 |",
    ]


def test_a_score_is_not_taken_for_that_of_other_settings(tmp_path: Path) -> None:
    _score(tmp_path / "runs", "gate-0", [], 0.45)
    (tmp_path / "rows.yaml").write_text("gate: [decoder.gate=true]\n")
    places = [str(tmp_path / "rows.yaml"), "--output-dir", str(tmp_path / "runs"), "--seeds", "0"]
    for more in (["--table"], ["--config", "configs/scenes.yaml", "training.epochs=5"]):
        result = run(["experiments/ablations.py", *places, *more])
        assert result.returncode == 2
        assert result.stderr.splitlines() == [
            f"capdist: error: {tmp_path}/runs/gate-0: was trained with decoder.gate=False, not True; delete it, or "
            "choose another --output-dir"
        ]


@pytest.mark.parametrize("name", ["base-1", "gate-0"])
def test_runs_of_other_settings_share_no_table(ablations: ModuleType, tmp_path: Path, name: str) -> None:
    _score(tmp_path, "base-0", [], 0.4)
    _score(tmp_path, name, ["decoder.gate=true"] if name == "gate-0" else [], 0.5, epochs=9)
    with pytest.raises(UsageError, match=f"{name}: was trained with training.epochs=9, not 5"):
        ablations.table({"base": [], "gate": ["decoder.gate=true"]}, tmp_path, [0, 1])


def test_seeds_of_a_row_may_differ_in_where_and_how_they_are_computed(ablations: ModuleType) -> None:
    may_differ = {
        f"{section}.{key}"
        for section in Recipe.model_fields
        for one in section_classes(section)
        for key, rule in rules_of(one).items()
        if ablations.may_differ(section, key, rule)
    }
    assert may_differ == {
        "run.name", "run.output_dir", "run.seed", "run.threads", "data.path", "data.num_workers",
        "training.start_from", "training.log_every", "evaluation.every_epochs", "evaluation.batch_size",
        "checkpoint.every_steps", "checkpoint.keep", "tracking.with", "tracking.project",
    }  # fmt: skip


def test_half_of_a_few_photos_is_not_half_of_all(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text("base: []\n")
    rows = str(tmp_path / "rows.yaml")
    result = run(["experiments/ablations.py", rows, "--config", "configs/scenes.yaml", "data.limit=10"])
    assert result.returncode == 2
    assert "data.limit: not here" in result.stderr


def test_a_run_that_fails_is_told_by_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text("with 0.5: []\n")
    places = ["--config", "configs/scenes.yaml", "--output-dir", str(tmp_path / "runs"), "--seeds", "0"]
    result = run(["experiments/ablations.py", str(tmp_path / "rows.yaml"), "encoder.name=resnet1", *places])
    assert result.returncode == 1
    assert f"with_0.5-0: failed, see {tmp_path}/runs/with_0.5-0.out" in result.stdout
