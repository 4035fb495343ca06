"""How far a piece of work is: a bar on a terminal, elsewhere log lines now and then."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from capdist.console import on_terminal, shows_bars

logger = logging.getLogger(__name__)

T = TypeVar("T")

LINE_EVERY_S = 30.0
"""Seconds between two lines about work that reports nothing else."""

NOTEWORTHY_WAIT = 0.1
"""Share of the time spent waiting for data from which on a bar mentions it."""


class Progress:
    """Shows how far a piece of work is, while its context is open.

    On a terminal this is a bar. Elsewhere it is a log line every `LINE_EVERY_S` seconds and one at the end. Training
    has a line for each `report` instead.

    Args:
        work: What is done, such as `encode train`; for training the name of the run.
        total: How many units the whole work has.
        unit: What is counted, in the singular.
        initial: Units that earlier starts have done. Speed and time left are those of this start.
        is_training: Whether `report` says all that is to be said.
        is_brief: Whether the work may be over at once: its bar appears after a second and vanishes at the end.
        is_main: Whether this is the process that speaks.
    """

    def __init__(
        self,
        work: str,
        total: int,
        unit: str,
        *,
        initial: int = 0,
        is_training: bool = False,
        is_brief: bool = False,
        is_main: bool = True,
    ) -> None:
        self.work, self.total, self.unit, self.initial = work, total, unit, initial
        self.is_training, self.is_brief, self.is_main = is_training, is_brief, is_main
        self.done = initial
        self._bar: tqdm | None = None
        self._exits = ExitStack()
        self._started_s = self._said_s = time.perf_counter()

    def __enter__(self) -> Progress:
        self._started_s = self._said_s = time.perf_counter()
        if self.is_main and shows_bars():
            self._exits.enter_context(logging_redirect_tqdm())
            self._bar = self._exits.enter_context(self._new_bar())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()
        if not self.is_training and self.total:
            self._say(is_over=True)

    def update(self, count: int = 1) -> None:
        """Add units that are done; the work never gets beyond its total."""
        count = min(count, self.total - self.done)
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self.is_training and time.perf_counter() - self._said_s >= LINE_EVERY_S and self.done < self.total:
            self._say(is_over=False)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items, and count each when the next one is asked for."""
        for item in items:
            yield item
            self.update()

    def report(self, values: Mapping[str, float], epochs: int) -> None:
        """Say how training goes.

        Args:
            values: `epoch` (1.5 is the middle of the second), `loss`, `lr`, `captions_per_second` and `data_wait`, the
                share of the time spent waiting for data.
            epochs: How many epochs the run has.
        """
        epoch = min(math.ceil(values["epoch"]), epochs)
        loss, speed = f"loss {values['loss']:.3f}", f"{values['captions_per_second']:,.0f} captions/s"
        if self._bar is not None:
            waits = values["data_wait"] >= NOTEWORTHY_WAIT
            self._bar.set_description_str(f"{self.work} epoch {epoch}/{epochs}", refresh=False)
            self._bar.set_postfix_str(f"{loss}, {speed}" + (f", data wait {values['data_wait']:.0%}" if waits else ""))
        elif self.is_main:
            logger.info(
                f"{self.work}: epoch {epoch} of {epochs}, step {self.done:,} of {self.total:,}, {loss}, "
                f"lr {values['lr']:.2g}, {speed}, {self._left}"
            )

    def _new_bar(self) -> tqdm:
        # With the name of the run and its figures a line of training just fits 80 columns.
        share, rate = ("", "") if self.is_training else ("{percentage:3.0f}%", ", {rate_fmt}")
        times = f"[{{elapsed}}<{{remaining}}{rate}{{postfix}}]"
        return tqdm(
            total=self.total, initial=self.initial, desc=self.work, unit=self.unit,
            leave=not self.is_brief, delay=int(self.is_brief),
            smoothing=0,  # the mean speed of this start, as in lines
            bar_format=f"{{desc}}: {share}|{{bar}}| {{n_fmt}}/{{total_fmt}} {times}",
        )  # fmt: skip

    def _say(self, *, is_over: bool) -> None:
        """Log a line, unless a bar shows the same."""
        self._said_s = time.perf_counter()
        if self.is_main and not on_terminal():
            units, speed = f"{self.unit}s", (self.done - self.initial) / max(self._elapsed_s, 1e-9)
            end = f" in {format_duration(self._elapsed_s)}" if is_over else ""
            left = "" if is_over else f", {self._left}"
            logger.info(f"{self.work}: {self.done:,} of {self.total:,} {units}{end}, {speed:,.1f} {units}/s{left}")

    @property
    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._started_s

    @property
    def _left(self) -> str:
        done = self.done - self.initial
        if not done:
            return "time left unknown"
        return f"{format_duration(self._elapsed_s / done * (self.total - self.done))} left"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as `2 h 5 min`."""
    seconds = round(seconds)
    for size, large, small_size, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size} {large} {seconds % size // small_size} {small}"
    return f"{seconds} s"
