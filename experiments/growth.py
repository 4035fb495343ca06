"""How time and memory of decoder training grow with the data, the batch and the number of processes.

    python experiments/growth.py --output docs/growth

Each measurement has its own process, with made-up features, captions of Flickr8k's lengths, 512 hidden units and 2,500
words. They take turns several times, so that other work on the machine slows all of them alike. The program writes
`growth.json` and `growth.png`, and prints the table of `docs/performance.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHANNELS = 256
"""Narrow features, 25 KB a photo, so that ten times Flickr8k fits on any disk."""
IMAGES = 600
"""A tenth of Flickr8k's training split."""
FULL = 32


def plan() -> list[dict[str, Any]]:
    """Return the measurements by kind."""
    data = [{"kind": "data", "x": factor, "images": IMAGES * factor} for factor in (1, 10, 100)]
    batch = [{"kind": "batch", "x": size, "batch_size": size, "images": 10 * IMAGES} for size in (8, 32, 128)]
    processes = [
        {"kind": "processes", "x": n, "processes": n, "threads": 2 // n, "batch_size": FULL // n, "images": 10 * IMAGES}
        for n in (1, 2)
    ]
    return [*data, *batch, *processes]


def measure_one(images: int, batch_size: int, threads: int, steps: int) -> dict[str, float]:
    """Train for some steps in this process, and return captions/s of all processes and the memory of this one."""
    from capdist.benchmark.training import Training
    from capdist.benchmark.workload import Workload
    from capdist.distributed.launch import build_accelerator
    from capdist.recipe.reading import recipe_from_dict

    recipe = recipe_from_dict(
        {
            "run": {"threads": threads},
            "data": {"batch_size": batch_size, "image_size": 112},
            # A small network stands in for the encoder, which never runs: its map is as wide as is wanted, 7x7 cells.
            "encoder": {"name": "resnet18", "last_block": "layer3", "weights": "none"},
        },
        "growth",
    )
    accelerator = build_accelerator(recipe)
    work = Workload.of(recipe, accelerator)
    assert (work.num_cells, work.channels) == (49, CHANNELS)
    with tempfile.TemporaryDirectory() as folder:
        training = Training(work, Path(folder), images)
        windows = training.windows(range(2 + steps))
        captions, waited = 0, 0.0
        for index in range(2 + steps):
            if index == 2:  # warmed up
                accelerator.wait_for_everyone()
                captions, waited, started = 0, 0.0, time.perf_counter()
            before = time.perf_counter()
            window = next(windows)
            waited += time.perf_counter() - before
            captions += training.step(index, window).num_captions
        accelerator.wait_for_everyone()
        seconds = time.perf_counter() - started
    accelerator.end_training()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "captions_per_second": captions / seconds,
        "data_wait": waited / seconds,
        "memory_mb": int(status["RssAnon"].split()[0]) / 1024,
        "mapped_mb": int(status["RssFile"].split()[0]) / 1024,
    }


def run(point: dict[str, Any], steps: int) -> dict[str, float]:
    """Measure one point in fresh processes."""
    processes = point.get("processes", 1)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", str(processes)]
    command += ["--multi_gpu"] if processes > 1 else ["--num_machines", "1", "--mixed_precision", "no"]
    batch_size = point.get("batch_size", FULL)
    # Each point takes about the same number of captions, since a step of a small batch is short.
    steps = max(3, steps * FULL // (batch_size * processes))
    arguments = [str(point["images"]), str(batch_size), str(point.get("threads", 2)), str(steps)]
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "GOMP_SPINCOUNT": "1000", "PYTHONPATH": root, "OMP_NUM_THREADS": arguments[2]
    }  # fmt: skip
    command += [__file__, "--one", *arguments]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(next(line for line in output.splitlines() if line.startswith("{"))))


def summarize(point: dict[str, Any], runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return a point with the medians of its runs."""
    return point | {key: statistics.median(r[key] for r in runs) for key in runs[0]} | {"runs": list(runs)}


def show(points: Sequence[dict[str, Any]]) -> None:
    """Print a markdown table."""
    print("| what grows | | captions/s | ms a photo | waiting for data | memory, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for p in points:
        photo = 5e3 / p["captions_per_second"]
        name = {"data": f"{p['images']:,} photos", "batch": f"{p['x']} photos a batch"}.get(p["kind"])
        name = name or f"{p['x']} x {p['threads']} threads"
        print(f"| {p['kind']} | {name} | {p['captions_per_second']:.0f} | {photo:.1f} | {p['data_wait']:.1%} | "
              f"{p['memory_mb']:.0f} |")  # fmt: skip


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot captions/s and memory over what grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = {"data": "photos (1 = 600)", "batch": "photos in a batch", "processes": "processes on the same two cores"}
    shown = {"captions_per_second": "captions/s", "memory_mb": "memory of a process, MB"}
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), sharey="row", layout="constrained")
    for column, (kind, label) in enumerate(labels.items()):
        mine = [p for p in points if p["kind"] == kind]
        xs = [p["x"] for p in mine]
        for row, (key, title) in enumerate(shown.items()):
            axis = axes[row][column]
            axis.plot(xs, [p[key] for p in mine], "o-")
            axis.set_ylim(0, 1.1 * max(p[key] for p in points))
            if kind != "processes":
                axis.set_xscale("log")
            axis.set_xticks(xs, [str(x) for x in xs])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(title)
            if row == 1:
                axis.set_xlabel(label)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("growth"), help="path of the .json and .png")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of 32 photos")
    parser.add_argument("--one", nargs=4, type=int, metavar="N", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        result = measure_one(*arguments.one)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result))
        return
    points = plan()
    runs: list[list[dict[str, float]]] = [[] for _ in points]
    for _ in range(arguments.rounds):
        for point, found in zip(points, runs, strict=True):
            found.append(run(point, arguments.steps))
    summaries = [summarize(point, found) for point, found in zip(points, runs, strict=True)]
    arguments.output.with_suffix(".json").write_text(json.dumps(summaries, indent=2) + "\n")
    draw(summaries, arguments.output.with_suffix(".png"))
    show(summaries)


if __name__ == "__main__":
    main()
