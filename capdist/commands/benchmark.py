"""What `capdist benchmark` does."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from capdist.benchmark.captioning import caption
from capdist.benchmark.encoding import encode, load_input
from capdist.benchmark.report import Table
from capdist.benchmark.training import epoch, train_step
from capdist.benchmark.workload import Workload
from capdist.distributed.launch import build_accelerator
from capdist.errors import UsageError, nearest
from capdist.files import write_atomically
from capdist.recipe.reading import load_recipe, recipe_from_dict
from capdist.recipe.sections import Recipe
from capdist.version import __version__

NAMES = ("train-step", "encode", "caption", "input", "epoch")


def load_sizes(config: str | None, overrides: Sequence[str]) -> Recipe:
    """Read the recipe to measure; without one, take the features of a ResNet-50 unchanged, and default sizes.

    Raises:
        UsageError: as `load_recipe`.
    """
    if config is not None:
        return load_recipe(config, overrides)
    sizes = {"data": {"batch_size": 32}, "encoder": {"name": "resnet50", "weights": "none"}}
    return recipe_from_dict(sizes, "command line", overrides)


def run_benchmarks(
    names: Sequence[str],
    recipe: Recipe,
    *,
    repeats: int,
    images: int | None,
    model: Path | None,
    with_textbook: bool,
    textbook_images: int | None = None,
    profile: Path | None,
    output: Path | None,
) -> dict[str, Any]:
    """Measure, print the tables and write them as JSON.

    Args:
        names: Benchmarks to run one after the other, from `NAMES`; none = all.
        recipe: Gives the sizes; its photos are used if `data.path` is given.
        repeats: How often each contestant is timed.
        images: How many photos or images each benchmark takes; None = a suitable number for each.
        model: Folder of a trained model that `caption` measures; None = random weights.
        with_textbook: Whether the textbook runs beside capdist.
        textbook_images: How many images the textbook captions in `caption`; None = a twentieth of the images.
        profile: Folder that traces are written to; None = no traces.
        output: JSON file that the results are written to; None = no file.

    Raises:
        UsageError: for an unknown name, or a recipe that is not what would be measured.
    """
    _check(names or NAMES, recipe, model, with_textbook)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    accelerator = build_accelerator(recipe)
    if accelerator.num_processes > 1 and set(names or NAMES) - {"train-step", "epoch"}:
        raise UsageError("benchmark: only train-step and epoch run in several processes; name them")
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True)
    work = Workload.of(recipe, accelerator)
    machine = _describe(work)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    tables = []
    for name in names or NAMES:
        trace = None if profile is None else profile / f"{name}.json"
        table = _measure(name, work, repeats, images, model, with_textbook, textbook_images, trace)
        table.show(console)
        tables.append(table.to_dict())
        if name in ("train-step", "epoch"):  # both train, and wrap the network in DDP
            work = Workload.of(recipe, accelerator)
    result = {"machine": machine, "recipe": recipe.to_dict(), "benchmarks": tables}
    if output is not None and accelerator.is_main_process:
        write_atomically(output, json.dumps(result, indent=2) + "\n")
    accelerator.end_training()
    return result


def _check(names: Sequence[str], recipe: Recipe, model: Path | None, with_textbook: bool) -> None:
    for name in names:
        if name not in NAMES:
            raise UsageError(f"benchmark: {name!r} is not one{nearest(name, NAMES)}")
    if with_textbook and recipe.decoder.name != "soft_attention":
        raise UsageError(
            f"benchmark: the plain implementation has no decoder {recipe.decoder.name!r}; measure it alone with "
            "--no-textbook"
        )
    trains = bool({"train-step", "epoch"} & set(names))
    if trains and not recipe.caches_features:
        raise UsageError("benchmark: train-step and epoch train on cached features, and this recipe caches none")
    if trains and (recipe.training.objective != "cross_entropy" or recipe.training.word_presence):
        raise UsageError(
            "benchmark: train-step and epoch measure training.objective=cross_entropy without training.word_presence; "
            "name such a recipe or stage"
        )
    if model is not None and recipe.data.path is None:
        raise UsageError("--model: captions the validation photos of data.path, which is missing")


def _measure(
    name: str,
    work: Workload,
    repeats: int,
    images: int | None,
    model: Path | None,
    with_textbook: bool,
    textbook_images: int | None,
    trace: Path | None,
) -> Table:
    if name == "train-step":
        return train_step(work, repeats=repeats, with_textbook=with_textbook, trace=trace)
    if name == "epoch":
        return epoch(work, num_images=images or 6000, repeats=repeats, with_textbook=with_textbook)
    if name == "caption":
        number = images or 4 * work.recipe.evaluation.batch_size
        num_plain = (textbook_images or max(1, number // 20)) if with_textbook else 0
        return caption(work, num_images=number, num_plain=num_plain, model=model, repeats=repeats, trace=trace)
    measure = encode if name == "encode" else load_input
    num_photos = images or 2 * work.recipe.encoder.batch_size
    return measure(work, num_photos=num_photos, repeats=repeats, with_textbook=with_textbook)


def _describe(work: Workload) -> dict[str, Any]:
    accelerator = work.accelerator
    device = accelerator.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "cells": work.num_cells,
        "channels": work.channels,
        "torch": torch.__version__,
        "capdist": __version__,
    }


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{found or platform.processor() or 'CPU'} ({torch.backends.cpu.get_cpu_capability()})"
