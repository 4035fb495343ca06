"""Measure what options are worth: train every row of a file with several seeds, and print the table.

    python experiments/ablations.py ROWS [section.key=value …] --config RECIPE [--seeds 0 1 2] [--jobs 2]
    python experiments/ablations.py ROWS --table

The files are `experiments/rows/*.yaml`, one for each stage of training; each begins with its command. Overrides may
contain `{seed}`, so that each seed of a stage starts from its own model of the stage before. Runs go seed by seed, so
that at any time all rows have nearly the same number of seeds. The program can be stopped: finished runs are not
trained again, and interrupted ones continue from their last checkpoint. Epochs are chosen on `dev-choose`, and the
table shows `dev-report`, whether or not the data set has a test split.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from capdist.distributed.launch import available_processors
from capdist.errors import UsageError, run_program
from capdist.recipe.reading import load_recipe, load_stages
from capdist.recipe.rules import Key
from capdist.recipe.sections import Recipe
from capdist.training.checkpoints import recipe_differences

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("bleu_1", "bleu_4", "cider")


def scores_of(folder: Path) -> dict[str, Any] | None:
    """Return the scores of a finished run on `dev-report`, or None."""
    scores = folder / "dev-report.json"
    return json.loads(scores.read_text(encoding="utf-8"))["metrics"] if scores.exists() else None


def check_settings(folder: Path, expected: Recipe) -> None:
    """Refuse a run that another recipe trained.

    Args:
        folder: Folder that a finished run has written.
        expected: What it should have trained, apart from its seed, its folder and its start.

    Raises:
        UsageError: with a line for each difference.
    """
    saved = load_recipe(folder / "config.yaml", is_saved=True)
    if mistakes := [
        f"{folder}: was trained with {section}.{key}={before}, not {after}; delete it, or choose another --output-dir"
        for section, key, before, after, rule in recipe_differences(saved.to_dict(), expected.to_dict())
        if not may_differ(section, key, rule)
    ]:
        raise UsageError(*mistakes)


def may_differ(section: str, key: str, rule: Key) -> bool:
    """Return whether two runs of a row may differ in a key: in their seed, and in what a resumed run may change.

    Rows compare encoders, so none of their keys may differ, not even how the weights are named.
    """
    return (section, key) == ("run", "seed") or (rule.resume == "always" and section != "encoder")


def folder_of(output: Path, row: str, seed: int) -> Path:
    """Return the folder of a run."""
    return output / f"{row.replace(' ', '_')}-{seed}"


def settings_of(changes: Sequence[str], seed: int, arguments: argparse.Namespace) -> list[str]:
    """Return the overrides that make a run of one row and seed."""
    common = ["evaluation.halve_validation=true", "tracking.with=[]"]
    return [*common, *(text.replace("{seed}", str(seed)) for text in arguments.overrides), *changes]


def check_plan(rows: Mapping[str, Sequence[str]], arguments: argparse.Namespace) -> None:
    """Check all rows before anything is trained.

    Raises:
        UsageError: an impossible recipe, or a folder of another one.
    """
    for (row, changes), seed in product(rows.items(), arguments.seeds):
        recipe = load_stages(arguments.config, settings_of(changes, seed, arguments))[-1]
        if recipe.data.limit is not None:
            raise UsageError("data.limit: not here: dev-report is half of all validation photos, not of the first few")
        folder = folder_of(arguments.output_dir, row, seed)
        if scores_of(folder):
            check_settings(folder, recipe)


def train(row: str, changes: Sequence[str], seed: int, arguments: argparse.Namespace) -> bool:
    """Train one row with one seed, or the rest of it, and score it; the output goes into a file beside its folder.

    Returns:
        Whether it has a score now.
    """
    folder = folder_of(arguments.output_dir, row, seed)
    if scores_of(folder):
        return True
    settings = settings_of(changes, seed, arguments)
    threads = max(1, available_processors() // arguments.jobs)
    own = [f"run.output_dir={folder.parent}", f"run.name={folder.name}", f"run.seed={seed}", f"run.threads={threads}"]
    program = ["--config_file", str(ROOT / "accelerate_config.yaml"), str(ROOT / "capdist" / "train.py")]
    training = [sys.executable, "-m", "accelerate.commands.launch", *program, "--config", arguments.config]
    data = load_stages(arguments.config, settings)[-1].data
    scoring = [sys.executable, "-m", "capdist.cli", "evaluate", str(folder / "model"), "--split", "dev-report"]
    scoring += ["--source", data.source, "--output", str(folder / "dev-report.json")]
    scoring += [] if data.path is None else ["--path", data.path]
    columns = {key: name for key, name in data.model_dump().items() if key.endswith("_column") and name is not None}
    scoring += [f"data.{key}={name}" for key, name in columns.items()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.out").open("a", encoding="utf-8") as out:
        for command in ([*training, *settings, *own, "--resume"], scoring):
            result = subprocess.run(
                command, stdout=out, stderr=out, check=False, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
            )
            if result.returncode != 0:
                break
    print(f"{folder.name}: {'done' if result.returncode == 0 else f'failed, see {out.name}'}", flush=True)
    return result.returncode == 0


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return `.1234 ± .0012`, with the deviation of the sample; a single value has none."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def table(rows: Mapping[str, Sequence[str]], output: Path, seeds: Sequence[int]) -> str:
    """Return the table of the runs that are finished.

    Raises:
        UsageError: if runs differ by more than their rows say.
    """
    lines = ["| row | changes | seeds | BLEU-1 | BLEU-4 | CIDEr |", "| --- " * 6 + "|"]
    base: Path | None = None
    for row, changes in rows.items():
        folders = [folder for seed in seeds if scores_of(folder := folder_of(output, row, seed))]
        if folders:
            base = base or (None if changes else folders[0])
            expected = load_recipe((base or folders[0]) / "config.yaml", changes, is_saved=True)
            for folder in folders:
                check_settings(folder, expected)
            scores = [scores_of(folder) or {} for folder in folders]
            figures = [mean_and_deviation([score[name] for score in scores]) for name in METRICS]
            shown = ", ".join(f"`{change}`" for change in changes)
            lines.append(f"| {row} | {shown} | {len(folders)} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, metavar="ROWS", help="YAML file: names of rows, and what each changes")
    parser.add_argument("--config", metavar="RECIPE", help="recipe that the rows change: YAML file, or shipped name")
    parser.add_argument("--only", nargs="+", help="names of rows; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the processor's cores")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablations"), help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all rows")
    arguments = parser.parse_intermixed_args()
    rows: dict[str, list[str]] = yaml.safe_load(arguments.rows.read_text(encoding="utf-8"))
    if unknown := [row for row in arguments.only or () if row not in rows]:
        parser.error(f"--only: no row {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, rows))}")
    if arguments.config is None and not arguments.table:
        parser.error("--config: which recipe do the rows change?")
    if arguments.only:
        rows = {row: rows[row] for row in arguments.only}
    is_whole = True
    if not arguments.table:
        check_plan(rows, arguments)
        planned = product(arguments.seeds, rows.items())
        with ThreadPoolExecutor(arguments.jobs) as pool:
            is_whole = all([*pool.map(lambda one: train(one[1][0], one[1][1], one[0], arguments), planned)])
    print(table(rows, arguments.output_dir, arguments.seeds))
    sys.exit(0 if is_whole else 1)


if __name__ == "__main__":
    sys.exit(run_program(main))
