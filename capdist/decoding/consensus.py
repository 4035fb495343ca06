"""Choosing, of the captions that a search found, the one that agrees with the others."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from capdist.decoding.constraints import IMPOSSIBLE
from capdist.decoding.hypotheses import SearchResult, best_first, gather_rows
from capdist.decoding.options import SearchOptions


def agree(found: SearchResult, options: SearchOptions) -> SearchResult:
    """Rank candidates by how much of what they say the other candidates say too.

    The caption of least Bayes risk (Kumar & Byrne 2004): the mean likeness of a candidate to all candidates, these
    weighed by probability ** (1 / `options.consensus`), where the likeness of two captions is the F1 of their sets of
    words, and the most frequent word counts 0, the r-th ln(r). Ids of words run from frequent to rare, so that by
    Zipf's law this is how rare a word is, up to a factor.

    Args:
        found: Candidates of each image, (B, R).
        options: Of the search; all special tokens have lower ids than any word.

    Returns:
        The same candidates, those that ended first, with the mean likeness, 0…1, as `scores`.
    """
    assert options.consensus is not None
    is_caption = found.log_probabilities != IMPOSSIBLE
    # float64: on a near tie it should not matter with which other images a caption was compared.
    words = _words(found, options)
    shared = words @ (words > 0).double().mT
    totals = words.sum(dim=-1)
    likeness = 2 * shared / (totals[:, :, None] + totals[:, None]).clamp(min=torch.finfo(torch.float64).tiny)
    trust = (found.log_probabilities.double() / options.consensus).softmax(dim=1).where(is_caption, 0)
    gains = (likeness @ trust[..., None]).squeeze(-1).float().where(is_caption, IMPOSSIBLE)
    order = best_first(gains)
    kind = found.ended.long() + is_caption  # 2 ended, 1 cut off, 0 nothing
    order = order.gather(1, best_first(kind.gather(1, order)))
    ranked: dict[str, Any] = {}
    for field in fields(found):
        value = gains if field.name == "scores" else getattr(found, field.name)
        ranked[field.name] = None if value is None else gather_rows(value, order)
    return SearchResult(**ranked)


def _words(found: SearchResult, options: SearchOptions) -> Tensor:
    """Return the weight of each word in each candidate that says it, else 0: (B, R, ids) float64."""
    first = 1 + max(options.pad_id, options.bos_id, options.eos_id, *options.suppressed_ids)
    positions = torch.arange(found.tokens.shape[2], device=found.tokens.device)
    said = positions < found.lengths[..., None]
    tokens = found.tokens.where(said, options.pad_id)
    weights = (tokens - first + 1).clamp(min=1).double().log()
    table = weights.new_zeros(*tokens.shape[:2], int(tokens.max()) + 1)
    return table.scatter_(2, tokens, weights)
