"""What a search may do: how wide, how long, which tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from capdist.errors import UsageError

_LEAST = {
    "bos_id": 0,
    "eos_id": 0,
    "pad_id": 0,
    "beam_size": 1,
    "max_length": 1,
    "min_length": 0,
    "no_repeat_ngram": 0,
}
"""The whole numbers among the options and the lowest value of each."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Options of every search; all mistakes are reported at once.

    Raises:
        UsageError: A value that makes no sense; one line a field.
    """

    bos_id: int
    """Token that the decoder reads before the first word."""
    eos_id: int
    """Token that ends a caption."""
    pad_id: int = 0
    """Token that fills a result behind the end of a caption."""
    suppressed_ids: tuple[int, ...] = ()
    """Tokens that are never written: `<pad>`, `<bos>`, `<unk>`."""
    beam_size: int = 3
    """Captions that beam search follows and returns an image (K); greedy search and sampling ignore it."""
    max_length: int = 30
    """Most words in a caption, `<eos>` not counted."""
    min_length: int = 0
    """Words before which `<eos>` is forbidden."""
    length_penalty: float = 0.0
    """Exponent alpha in `score = log p / length**alpha`, where the length counts the words and `<eos>`: 0
    compares probabilities, 1 the mean log p of a token. This is the plain normalisation by length that Wu et
    al. 2016 (GNMT, arXiv:1609.08144, section 7) start from, and what fairseq's `--lenpen` does."""
    no_repeat_ngram: int = 0
    """No caption has the same n words in a row twice; 0 allows it."""
    consensus: float | None = None
    """Temperature at which `search` trusts candidates to rank three or more by how far they agree, see
    `capdist.decoding.consensus`; None ranks them by score. Ids of words must run from frequent to rare, above all
    special and suppressed ones."""

    def __post_init__(self) -> None:
        mistakes = [*self._wrong_types()] or [*self._wrong_values()]
        if mistakes:
            raise UsageError(*mistakes)

    def __str__(self) -> str:
        """Return what tells this search from others, for the title of a table."""
        names = ("length_penalty", "no_repeat_ngram", "min_length", "consensus")
        changed = [f"{name.replace('_', ' ')} {value:g}" for name in names if (value := getattr(self, name))]
        return ", ".join([f"beam {self.beam_size}", *changed])

    def _wrong_types(self) -> Iterator[str]:
        for name in _LEAST:
            if not _is_whole(value := getattr(self, name)):
                yield f"{name}: {value!r} is not a whole number"
        if not _is_number(self.length_penalty):
            yield f"length_penalty: {self.length_penalty!r} is not a number"
        if self.consensus is not None and not _is_number(self.consensus):
            yield f"consensus: {self.consensus!r} is neither a number nor None"
        if not isinstance(self.suppressed_ids, tuple) or not all(map(_is_whole, self.suppressed_ids)):
            yield f"suppressed_ids: {self.suppressed_ids!r} is not a tuple of whole numbers"

    def _wrong_values(self) -> Iterator[str]:
        for name, minimum in _LEAST.items():
            if (value := getattr(self, name)) < minimum:
                yield f"{name}: {value} must be {minimum} or more"
        if self.min_length > self.max_length:
            yield f"min_length: {self.min_length} must be at most max_length ({self.max_length})"
        if not (math.isfinite(self.length_penalty) and self.length_penalty >= 0):
            yield f"length_penalty: {self.length_penalty} must be a finite number, 0 or more"
        if self.consensus is not None and not (math.isfinite(self.consensus) and self.consensus > 0):
            yield f"consensus: {self.consensus} must be a finite number above 0, or None"
        if any(token < 0 for token in self.suppressed_ids):
            yield f"suppressed_ids: {self.suppressed_ids} must all be 0 or more"
        if self.eos_id in self.suppressed_ids:
            yield f"suppressed_ids: {self.suppressed_ids} must leave out eos_id ({self.eos_id})"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
