"""Exponential moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The EMA weights, which are validated and saved in the model folder; training continues with the raw weights.

    After step t it moves by `1 - min(decay, (1 + t) / (10 + t))` towards the weights. This is the warm-up of
    TensorFlow's `ExponentialMovingAverage`: a new average soon forgets the initial weights.

    Args:
        model: The network without the wrapper of `accelerator.prepare`; BatchNorm statistics are not averaged.
        decay: Share of the average that a step keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step; `step` steps have been taken."""
        keep = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), list(self._weights.values()), 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the model within the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            averaged = self.tensors[name].clone()
            self.tensors[name].copy_(weight)
            weight.copy_(averaged)
