"""Options of a search: how wide it is, how long captions may be, and which tokens they may have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from capdist.errors import Mistake, UsageError
from capdist.recipe.rules import NotNegative, Positive, usage_error
from capdist.recipe.search import SearchSettings


class SearchOptions(SearchSettings):
    """Options of every search: its settings, and what they mean for one vocabulary.

    `length_penalty` is alpha in `score = log p / length**alpha`, where the length counts the words and `<eos>`: 0
    compares probabilities, 1 the mean log p of a token. This is the plain normalisation by length that Wu et al. 2016
    (GNMT, arXiv:1609.08144, section 7) start from, and what fairseq's `--lenpen` does. For `consensus`, ids of words
    must run from frequent to rare, above all special and suppressed ones; see `capdist.decoding.consensus`.

    Raises:
        UsageError: with one line for each value that makes no sense.
    """

    bos_id: NotNegative
    """Token that the decoder reads before the first word."""
    eos_id: NotNegative
    """Token that ends a caption."""
    pad_id: NotNegative = 0
    """Token that fills a result behind the end of a caption."""
    suppressed_ids: tuple[NotNegative, ...] = ()
    """Tokens that are never written: `<pad>`, `<bos>`, `<unk>`."""
    max_length: Positive = 30
    """Most words in a caption, `<eos>` not counted."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise usage_error(error) from None
        if mistakes := [*self._mistakes()]:
            raise UsageError(*mistakes)

    def _mistakes(self) -> Iterator[Mistake]:
        if self.min_length > self.max_length:
            yield Mistake("min_length", f"{self.min_length} must be at most max_length ({self.max_length})")
        if self.eos_id in self.suppressed_ids:
            yield Mistake("suppressed_ids", f"{self.suppressed_ids} must leave out eos_id ({self.eos_id})")
