"""Captions of different lengths as the words that a loop over positions reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """The words of captions: all first words, longest caption first, then all second words, and so on.

    It is worked out on the host, so that a device never has to tell how many captions are left.

    Attributes:
        rows: (rows,) from the longest caption to the shortest, those of equal length in their order.
        words: (W,) where in (rows, T), flattened, each word is.
        counts: How many captions have a first word, a second, and so on.
    """

    rows: Tensor
    words: Tensor
    counts: list[int]

    @classmethod
    def of(cls, lengths: Tensor, width: int, device: torch.device) -> Packing:
        """Pack captions of `lengths` (rows,), on the host, that lie in (rows, `width`); indices go to the device."""
        rows = lengths.argsort(descending=True, stable=True)
        positions = torch.arange(width)
        present = lengths[rows] > positions[:, None]
        words = (rows * width + positions[:, None])[present]
        counts = [count for count in present.sum(dim=1).tolist() if count]
        return cls(rows.to(device, non_blocking=True), words.to(device, non_blocking=True), counts)

    def pick(self, values: Tensor) -> Tensor:
        """Return the words (W,) of `values` (rows, T)."""
        return values.flatten()[self.words]
