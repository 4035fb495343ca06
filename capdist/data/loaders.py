"""Decides from the seed alone which process sees which sample when; the loaders follow that plan."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from capdist.data.batches import (
    CaptionBatch,
    CaptionDataset,
    Collator,
    PhotoDataset,
    SampleKey,
    Unreadable,
    collate_photos,
)
from capdist.data.captions import CaptionTable, seed_of
from capdist.errors import DataError, ProcessError


@dataclass(frozen=True, eq=False)
class Plan:
    """The global order of training.

    An epoch shows each caption once. An image with more captions than one pass takes comes in several parts. A step
    takes the next `batch_size * num_processes * accumulation` of the epoch's shuffled parts; the last step of an epoch
    takes the rest. The processes share each micro-batch evenly. A process without a sample gets a filler without
    weight, so all processes take every step together and no sample comes twice.

    Attributes:
        parts: (parts, 2), the image and the number of each part.
        batch_size: How many images one process has in a micro-batch.
        num_processes: How many processes share each step.
        accumulation: How many micro-batches make a step.
        seed: The run's seed; it decides the order.
    """

    parts: NDArray[np.int64]
    batch_size: int
    num_processes: int
    accumulation: int
    seed: int

    @classmethod
    def build(
        cls,
        captions: CaptionTable,
        *,
        captions_per_image: int,
        batch_size: int,
        num_processes: int,
        accumulation: int,
        seed: int,
    ) -> Plan:
        """Make the plan of a training split.

        Raises:
            DataError: if there is no caption to train on.
        """
        num_parts = -(-captions.captions_of_images // captions_per_image)
        images = np.repeat(np.arange(captions.num_images), num_parts)
        if not len(images):
            raise DataError("the training split has no caption with a word in it; `capdist check` shows what is there")
        firsts = np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
        parts = np.stack([images, np.arange(len(images)) - firsts], axis=1)
        return cls(parts, batch_size, num_processes, accumulation, seed)

    @property
    def parts_per_step(self) -> int:
        """Parts of a full step, over all processes."""
        return self.batch_size * self.num_processes * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.parts) / self.parts_per_step)

    def epoch_of(self, step: int) -> int:
        """Return the epoch, counted from 0, in which the step with this index (from 0) lies."""
        return step // self.steps_per_epoch

    def micro_batches(self, step: int) -> int:
        """Return the micro-batches of a step, the same in every process."""
        return math.ceil(len(self._parts_of(step)) / (self.batch_size * self.num_processes))

    def keys(self, step: int, rank: int) -> list[list[SampleKey]]:
        """Return the samples of one process in one step, by micro-batch."""
        epoch, parts = self.epoch_of(step), self._parts_of(step)
        size = self.batch_size * self.num_processes
        result = []
        for start in range(0, len(parts), size):
            micro = parts[start : start + size]
            mine = np.array_split(micro, self.num_processes)[rank]
            keys = [SampleKey(epoch, int(image), int(part)) for image, part in mine]
            result.append(keys or [SampleKey(epoch, int(micro[0][0]), 0, is_filler=True)])
        return result

    def _parts_of(self, step: int) -> NDArray[np.int64]:
        start = (step % self.steps_per_epoch) * self.parts_per_step
        order = _epoch_order(len(self.parts), self.seed, self.epoch_of(step))
        return self.parts[order[start : start + self.parts_per_step]]


@lru_cache(maxsize=2)
def _epoch_order(num_parts: int, seed: int, epoch: int) -> NDArray[np.int64]:
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    order: NDArray[np.int64] = torch.randperm(num_parts, generator=generator).numpy()
    return order


class _PlanSampler(Sampler[list[SampleKey]]):
    def __init__(self, plan: Plan, rank: int, steps: range) -> None:
        self.plan, self.rank, self.steps = plan, rank, steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for step in self.steps:
            yield from self.plan.keys(step, self.rank)

    def __len__(self) -> int:
        return sum(map(self.plan.micro_batches, self.steps))


def training_batches(
    dataset: CaptionDataset, plan: Plan, rank: int, steps: range, *, num_workers: int, pin_memory: bool
) -> Iterator[CaptionBatch]:
    """Yield the micro-batches of one process for a range of steps, across epochs.

    Raises:
        DataError, OSError: when a photo cannot be read.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=_PlanSampler(plan, rank, steps),
        collate_fn=Collator(dataset.captions_per_image),
        **_loader_options(num_workers, pin_memory),
    )
    return _good(loader)


def photo_batches(
    dataset: PhotoDataset, rows: Sequence[int], *, batch_size: int, num_workers: int, pin_memory: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield rows (B,) and photos uint8 (B, 3, S, S) of some rows of a split, in order.

    Raises:
        DataError, OSError: when a photo cannot be read.
    """
    batches = [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    loader = DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate_photos, **_loader_options(num_workers, pin_memory)
    )
    return _good(loader)


def _loader_options(num_workers: int, pin_memory: bool) -> dict[str, Any]:
    # With its own generator the loader draws nothing from torch's global one, which dropout uses.
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "generator": torch.Generator().manual_seed(0),
    }
    if num_workers:
        options["prefetch_factor"] = 4
        options["worker_init_fn"] = _leave_signals_to_main
    return options


def _leave_signals_to_main(worker: int) -> None:
    """Keep a worker alive when a terminal or a scheduler signals all processes of a job at once.

    The main process still needs its batches, for the step after which it saves a checkpoint. A second SIGTERM ends the
    worker: torch, and finally `multiprocessing`, send one to workers that have not ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _good(loader: DataLoader[Any]) -> Iterator[Any]:
    try:
        for batch in loader:
            if isinstance(batch, Unreadable):
                raise batch
            yield batch
    except RuntimeError as error:
        if re.search("DataLoader worker.*(killed|exited unexpectedly)", str(error)):
            raise ProcessError(f"{error}; if memory ran out, lower data.num_workers or data.batch_size") from None
        raise
