"""The words of captions of different lengths without their padding, for a loop over positions.

In a batch of 160 captions of Flickr8k, cut after 20 words, 44 % of the places are padding. A loop that reads the
longest caption first can drop each caption where it ends: the captions that go on are always the first rows.
The plain form is a loop over all positions of the padded batch that ignores what it computes for padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """The words of captions: all first words, longest caption first, then all second words, and so on.

    It is worked out on the host. A GPU would have to be waited for at each position to learn how many captions go on.

    Attributes:
        rows: (rows,) Numbers of the captions, the longest first; captions of equal length keep their order.
        words: (W,) Place of each word in the flattened (rows, T).
        counts: Number of captions that have a first word, a second word, and so on.
    """

    rows: Tensor
    words: Tensor
    counts: list[int]

    @classmethod
    def of(cls, lengths: Tensor, width: int, device: torch.device) -> Packing:
        """Pack the captions of a padded batch.

        Args:
            lengths: (rows,) Words of each caption, on the host; 0 for a row without a caption.
            width: T, to which the batch is padded.
            device: Where the indices go.
        """
        # A stable sort: the same batch gives the same order, and so the same sums, on every machine.
        rows = lengths.argsort(descending=True, stable=True)
        positions = torch.arange(width)
        present = lengths[rows] > positions[:, None]  # (T, rows): selecting from it goes position by position
        words = (rows * width + positions[:, None])[present]
        counts = [count for count in present.sum(dim=1).tolist() if count]
        return cls(rows.to(device, non_blocking=True), words.to(device, non_blocking=True), counts)

    def pick(self, values: Tensor) -> Tensor:
        """Return the words (W,) of `values` (rows, T)."""
        return values.flatten()[self.words]
