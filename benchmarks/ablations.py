"""What an option is worth: train every row of `benchmarks/ablations.yaml` with several seeds, and print the table.

    python benchmarks/ablations.py data.path=/where/flickr8k/is [--seeds 0 1 2] [--jobs 2] [section.key=value …]
    python benchmarks/ablations.py --table

Seed by seed, so that at any time all rows have about as many. It can be stopped: what is finished is not trained again,
and what was cut off goes on from its last checkpoint. Epochs are chosen on `dev-choose`, the table is of `dev-report`.
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

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("bleu_1", "bleu_4", "cider")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, none if there is none."""
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def final_scores(folder: Path) -> dict[str, Any] | None:
    """Return the final line of a run that is over."""
    return next((line for line in read_log(folder) if line.get("final")), None)


def folder_of(output: Path, row: str, seed: int) -> Path:
    """Return the folder of a run."""
    return output / f"{row.replace(' ', '_')}-{seed}"


def train(row: str, changes: Sequence[str], seed: int, arguments: argparse.Namespace) -> None:
    """Train one row with one seed, or what is left of it; its output goes into a file beside its folder."""
    folder = folder_of(arguments.output_dir, row, seed)
    if final_scores(folder):
        return
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    own = [f"run.output_dir={folder.parent}", f"run.name={folder.name}", f"run.seed={seed}", f"run.threads={threads}"]
    program = ["--config_file", str(ROOT / "accelerate_config.yaml"), str(ROOT / "capdist" / "train.py")]
    command = [sys.executable, "-m", "accelerate.commands.launch", *program, "--config", str(arguments.config)]
    settings = [f"training.epochs={arguments.epochs}", "evaluation.halve_validation=true", "tracking.with=[]"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".out").open("a", encoding="utf-8") as out:
        result = subprocess.run(
            [*command, *settings, *arguments.overrides, *changes, *own, "--resume"],
            stdout=out, stderr=out, check=False, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
    print(f"{folder.name}: {'done' if result.returncode == 0 else f'failed, see {out.name}'}", flush=True)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return `.1234 ± .0012`, the deviation of the sample; a value by itself has none."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def table(rows: Mapping[str, Sequence[str]], output: Path, seeds: Sequence[int]) -> str:
    """Return the table of what is there."""
    lines = ["| row | changes | seeds | BLEU-1 | BLEU-4 | CIDEr |", "| --- " * 6 + "|"]
    for row, changes in rows.items():
        scores = [found for seed in seeds if (found := final_scores(folder_of(output, row, seed)))]
        if scores:
            figures = [mean_and_deviation([score[name] for score in scores]) for name in METRICS]
            shown = ", ".join(f"`{change}`" for change in changes)
            lines.append(f"| {row} | {shown} | {len(scores)} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "flickr8k_frozen.yaml")
    parser.add_argument("--rows", type=Path, default=ROOT / "benchmarks" / "ablations.yaml")
    parser.add_argument("--only", nargs="+", help="names of rows; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the processor's cores")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all rows")
    arguments = parser.parse_intermixed_args()
    rows: dict[str, list[str]] = yaml.safe_load(arguments.rows.read_text(encoding="utf-8"))
    if unknown := [row for row in arguments.only or () if row not in rows]:
        parser.error(f"--only: no row {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, rows))}")
    if arguments.only:
        rows = {row: rows[row] for row in arguments.only}
    if not arguments.table:
        planned = product(arguments.seeds, rows.items())
        with ThreadPoolExecutor(arguments.jobs) as pool:
            # A list, so that an error of any is raised here.
            list(pool.map(lambda one: train(one[1][0], one[1][1], one[0], arguments), planned))
    print(table(rows, arguments.output_dir, arguments.seeds))


if __name__ == "__main__":
    main()
