"""`train-step` and `epoch`: decoder training from cached features, beside the textbook."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from capdist.benchmark import textbook
from capdist.benchmark.measure import Timing, count_flops, matrix_product, shares_of_time, time_in_turns
from capdist.benchmark.report import Row, Table
from capdist.benchmark.workload import Workload, made_up_captions, made_up_features
from capdist.data.batches import CaptionBatch, CaptionDataset
from capdist.data.loaders import Plan, training_batches
from capdist.features.source import StoredFeatures
from capdist.features.store import FeatureStore
from capdist.training.objectives import CrossEntropy
from capdist.training.optimization import build_optimizer
from capdist.training.step import TrainStep

TEXTBOOK_BATCH = 32
"""Captions in a batch of the textbook, each with its own photo, as in most published recipes."""

DIFFERENT_BATCHES = 4


class Training:
    """capdist's own step over made-up features and captions.

    Args:
        work: What is measured.
        folder: Folder to which the made-up features are written.
        num_images: How many images the made-up training split has.
    """

    def __init__(self, work: Workload, folder: Path, num_images: int) -> None:
        self.work = work
        recipe, accelerator = work.recipe, work.accelerator
        store = FeatureStore(made_up_features(folder / "features.npy", num_images, work.num_cells, work.channels))
        store.hold(accelerator.device)
        optimizer = build_optimizer(work.model, recipe.training)
        model, optimizer = accelerator.prepare(work.model, optimizer)
        model.train()
        source = StoredFeatures(store, accelerator.device)
        self.step = TrainStep(accelerator, model, optimizer, recipe, source, CrossEntropy(recipe))
        captions = made_up_captions(num_images, recipe.text.max_length)
        self.plan = Plan.build(
            captions,
            captions_per_image=recipe.data.captions_per_image,
            batch_size=recipe.data.batch_size,
            num_processes=accelerator.num_processes,
            accumulation=recipe.training.accumulation,
            seed=0,
        )
        self.dataset = CaptionDataset(None, captions, work.preprocessing, None, recipe.data.captions_per_image, 0)

    def windows(self, steps: range) -> Iterator[list[CaptionBatch]]:
        """Yield the micro-batches of each step as a run would load them."""
        batches = training_batches(
            self.dataset,
            self.plan,
            self.work.accelerator.process_index,
            steps,
            num_workers=self.work.recipe.data.num_workers,
            pin_memory=self.work.accelerator.device.type == "cuda",
        )
        for index in steps:
            yield [next(batches) for _ in range(self.plan.micro_batches(index))]


def train_step(work: Workload, *, repeats: int, with_textbook: bool, trace: Path | None) -> Table:
    """Time optimizer steps: forward, backward, clipping, update."""
    device, num_processes = work.accelerator.device, work.accelerator.num_processes
    functions: dict[str, Callable[[], object]] = {"matrix product": matrix_product(device, work.dtype)}
    captions: dict[str, float] = {}
    if with_textbook:
        functions["textbook"], captions["textbook"] = _textbook_step(work), float(TEXTBOOK_BATCH * num_processes)
    with tempfile.TemporaryDirectory() as folder:
        parts = -(-5 // work.recipe.data.captions_per_image)
        num_images = -(-DIFFERENT_BATCHES * work.recipe.data.batch_size * num_processes // parts)
        training = Training(work, Path(folder), max(num_images, work.recipe.data.batch_size * num_processes))
        functions["capdist"], mean = _own_step(training)
        captions["capdist"] = mean * num_processes
        flops = {name: count_flops(functions[name], DIFFERENT_BATCHES) for name in captions}
        timings = time_in_turns(functions, repeats=repeats, device=device, flops=flops)
        shares = shares_of_time(functions["capdist"], device, trace) if trace is not None else {}
    rows = [Row.of(name, timing, captions.get(name), num_processes) for name, timing in timings.items()]
    return Table("train-step", "captions", rows, shares=shares)


def _own_step(training: Training) -> tuple[Callable[[], object], float]:
    windows = list(training.windows(range(min(DIFFERENT_BATCHES, training.plan.steps_per_epoch))))
    numbered = itertools.cycle(enumerate(windows))

    def step() -> None:
        training.step(*next(numbered))

    return step, sum(batch.num_captions for window in windows for batch in window) / len(windows)


def _textbook_step(work: Workload) -> Callable[[], object]:
    device = work.accelerator.device
    decoder = work.model.decoder
    network: Any = textbook.Captioner(
        work.model.projection, textbook.decoder_like(decoder, work.recipe.decoder.dropout)
    )
    network.to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    table = made_up_captions(TEXTBOOK_BATCH * DIFFERENT_BATCHES, work.recipe.text.max_length)
    dataset = CaptionDataset(None, table, work.preprocessing, None, 1, 0)
    plan = Plan.build(table, captions_per_image=1, batch_size=TEXTBOOK_BATCH, num_processes=1, accumulation=1, seed=0)
    loader = training_batches(dataset, plan, 0, range(DIFFERENT_BATCHES), num_workers=0, pin_memory=False)
    batches = itertools.cycle([batch.to(device) for batch in loader])
    features = torch.randn(TEXTBOOK_BATCH, textbook.GRID**2, work.channels, device=device).relu()

    def step() -> None:
        batch = next(batches)
        with work.accelerator.autocast():
            textbook.train_step(
                network, optimizer, features, batch.input_ids, batch.labels, torch.tensor(batch.lengths, device=device)
            )

    return step


def epoch(work: Workload, *, num_images: int, repeats: int, with_textbook: bool) -> Table:
    """Time one whole epoch with its loader, and estimate the textbook's from its steps."""
    device, num_processes = work.accelerator.device, work.accelerator.num_processes
    rows = []
    num_captions = float(num_images * 5)
    if with_textbook:
        timing = time_in_turns({"textbook": _textbook_step(work)}, repeats=repeats, device=device)["textbook"]
        rows.append(textbook_epoch(timing, num_captions, num_processes))
    with tempfile.TemporaryDirectory() as folder:
        training = Training(work, Path(folder), num_images)
        windows = training.windows(range(training.plan.steps_per_epoch))
        waited, started = 0.0, time.perf_counter()
        for index in range(training.plan.steps_per_epoch):
            before = time.perf_counter()
            window = next(windows)
            waited += time.perf_counter() - before
            training.step(index, window)
        work.accelerator.wait_for_everyone()
        seconds = time.perf_counter() - started
    note = f"waited for data {waited / seconds:.1%} of the time"
    rows.append(Row("capdist", (seconds,), seconds, num_captions, None, num_processes, note))
    return Table("epoch", "captions", rows)


def textbook_epoch(timing: Timing, num_captions: float, num_processes: int) -> Row:
    """Estimate the textbook's epoch from its step; the processes share the steps of the epoch evenly.

    Args:
        timing: How long a step takes when all processes take one at once.
        num_captions: How many captions an epoch has.
        num_processes: How many processes share the captions.
    """
    steps = num_captions / (TEXTBOOK_BATCH * num_processes)
    note = f"{steps:.0f} x its median step"
    return Row.of("textbook", timing, num_captions, num_processes, calls=steps, note=note)
