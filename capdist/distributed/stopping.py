"""Signals: a request to stop is recorded, agreed on by all processes, and obeyed between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from capdist.console import name_signal
from capdist.distributed.launch import on_main
from capdist.errors import Stopped


class StopSignals:
    """Record SIGTERM and SIGINT instead of ending; a second one ends the process at once.

    Attributes:
        received: Number of the first signal, or 0.
    """

    _handled = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in self._handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Return whether any process was told to stop. All must call it together."""
        told = torch.tensor(int(self.received > 0), device=accelerator.device)
        return bool(accelerator.reduce(told, "sum"))

    def stopped(self, accelerator: Accelerator, where: str) -> Stopped:
        """Return the error that ends every process. All must call it together, once they agreed to stop.

        Args:
            accelerator: Shares the number of the signal among processes.
            where: Says where the run stopped, and how to continue it.
        """
        # If neither the main process nor this one got the signal, report SIGTERM, which schedulers send.
        number = on_main(accelerator, lambda: self.received) or self.received or signal.SIGTERM
        return Stopped(number, f"stopped by {name_signal(number)} {where}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
