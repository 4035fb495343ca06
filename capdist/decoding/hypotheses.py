"""Captions under way and captions found: one tensor a field, a row a caption.

Shapes: B images, R rows of an image, T positions (`max_length`), N cells of the encoder grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from capdist.decoding.constraints import IMPOSSIBLE
from capdist.decoding.options import SearchOptions
from capdist.errors import NumericsError


@dataclass(frozen=True)
class SearchResult:
    """Candidates of each image, best first: those that ended by score, then those cut off by score.
    Where `search` ranks them by agreement, that is the score.

    If an image has fewer captions than were asked for, the last candidates are empty: no words, not ended,
    log-probability and score minus infinity.
    """

    tokens: Tensor
    """Words without `<bos>` and `<eos>`, (B, R, T) long, `pad_id` behind the end."""
    lengths: Tensor
    """Number of words, (B, R) long."""
    log_probabilities: Tensor
    """Sum of ln p under the model over the words, and `<eos>` if the caption ended, (B, R) float32."""
    scores: Tensor
    """Log-probabilities divided by (words + `<eos>` if it ended) ** length_penalty, or agreement, (B, R) float32."""
    ended: Tensor
    """Whether the caption ended with `<eos>`, (B, R) bool; false for one cut off at `max_length`."""
    attention: Tensor | None
    """Attention that each word was written with, (B, R, T, N) float32, 0 behind the end, or None."""


@dataclass
class Hypotheses:
    """Rows of captions; a row whose total is minus infinity holds nothing."""

    words: Tensor  # (B, R, T) long
    lengths: Tensor  # (B, R) long
    totals: Tensor  # (B, R) float32
    ended: Tensor  # (B, R) bool
    attention: Tensor | None  # (B, R, T, N) float32

    @classmethod
    def start(cls, features: Tensor, rows: int, options: SearchOptions, with_attention: bool) -> Hypotheses:
        """Return `rows` captions without words for each image of `features` (B, N, channels)."""
        images, cells, _ = features.shape
        device, positions = features.device, options.max_length
        return cls(
            words=torch.full((images, rows, positions), options.pad_id, dtype=torch.long, device=device),
            lengths=torch.zeros(images, rows, dtype=torch.long, device=device),
            totals=torch.zeros(images, rows, device=device),
            ended=torch.zeros(images, rows, dtype=torch.bool, device=device),
            attention=torch.zeros(images, rows, positions, cells, device=device) if with_attention else None,
        )

    def append(self, rows: Tensor, tokens: Tensor, attention: Tensor, position: int) -> None:
        """Write one more word into some rows, in place.

        Args:
            rows: True for the rows that grow, (B, R) bool.
            tokens: Their next word, (B, R).
            attention: The attention that it was written with, (B, R, N).
            position: Number of words that growing rows have so far.
        """
        self.words[:, :, position] = tokens.where(rows, self.words[:, :, position])
        self.lengths += rows
        if self.attention is not None:
            self.attention[:, :, position] = attention.where(rows.unsqueeze(-1), 0)

    def take(self, rows: Tensor) -> Hypotheses:
        """Return a copy that has, as row `r` of image `b`, row `rows[b, r]`; (B, new rows) long."""
        return self._map(lambda values: gather_rows(values, rows))

    def select(self, images: Tensor) -> Hypotheses:
        """Return a copy that has the rows of some images (kept,) long."""
        return self._map(lambda values: values[images])

    def join(self, other: Hypotheses) -> Hypotheses:
        """Return the rows of both, the other's behind these."""
        return Hypotheses.cat([self, other], dim=1)

    @classmethod
    def cat(cls, parts: Sequence[Hypotheses], dim: int = 0) -> Hypotheses:
        """Return the images of all parts, one part behind the other; with `dim=1` the rows of each image."""
        columns = zip(*(part._values() for part in parts), strict=True)
        values: Any = (None if column[0] is None else torch.cat(column, dim) for column in columns)
        return cls(*values)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Hypotheses:
        values: Any = (None if value is None else function(value) for value in self._values())
        return Hypotheses(*values)

    def _values(self) -> Iterator[Any]:
        return (getattr(self, field.name) for field in fields(self))

    def scores(self, length_penalty: float) -> Tensor:
        """Return totals divided by length ** `length_penalty`, (B, R); `<eos>` counts where a row has it."""
        lengths = (self.lengths + self.ended).clamp(min=1)  # avoids 0 / 0 for a row that could not start
        return self.totals / lengths.to(self.totals.dtype).pow(length_penalty)

    def result(self, count: int, options: SearchOptions) -> SearchResult:
        """Return the `count` best rows of each image, sorted.

        Rows that hold nothing may have words from before they became impossible. The first `count` rows must be
        captions or blank from the start, so that a blank row, found first among equals, fills an empty place.

        Raises:
            NumericsError: A total is NaN.
        """
        if self.totals.isnan().any():
            raise NumericsError("decoder: its logits must be finite or minus infinity, found NaN or plus infinity")
        ranked = self.take(best_first(self.scores(options.length_penalty)))
        kind = ranked.ended.long() + (ranked.totals != IMPOSSIBLE)  # 2 ended, 1 cut off, 0 nothing
        best = ranked.take(best_first(kind)[:, :count])
        return SearchResult(
            tokens=best.words,
            lengths=best.lengths,
            log_probabilities=best.totals,
            scores=best.scores(options.length_penalty),
            ended=best.ended,
            attention=best.attention,
        )


def gather_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Return, as row `r` of image `b`, row `rows[b, r]` of `values`.

    Args:
        values: (B, R, ...).
        rows: (B, new rows) long.

    Returns:
        (B, new rows, ...), a copy.
    """
    index = rows.reshape(*rows.shape, *[1] * (values.ndim - 2)).expand(*rows.shape, *values.shape[2:])
    return values.gather(1, index)


def best_first(values: Tensor) -> Tensor:
    """Return the rows of each image from the highest value to the lowest, (B, R); ties keep their order."""
    return values.argsort(dim=1, descending=True, stable=True)
