"""Consensus (MBR) reranking: choose the caption that is most similar to the others that a search found."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from capdist.decoding.constraints import IMPOSSIBLE
from capdist.decoding.hypotheses import SearchResult, best_first, gather_rows
from capdist.decoding.options import SearchOptions


def agree(found: SearchResult, options: SearchOptions) -> SearchResult:
    """Rank candidates by how much they have in common with the other candidates.

    This is minimum Bayes risk (MBR) reranking (Kumar & Byrne 2004). A candidate's score is its mean likeness to all
    candidates, weighted by their probability ** (1 / `options.consensus`). The likeness of two captions is the F1 of
    their sets of words; that of a caption to itself is 1. The most frequent word counts 0, the r-th most frequent
    ln(r). Ids of words run from frequent to rare. By Zipf's law ln(r) is, up to a factor, the logarithm of how much
    rarer a word is than the first.

    Args:
        found: Candidates of each image, (B, R).
        options: Gives `consensus`, the temperature of the weights.

    Returns:
        The same candidates, those that ended first, with the mean likeness, 0…1, as `scores`.
    """
    assert options.consensus is not None
    # On the host, in float64, which not every accelerator has: a near tie must not depend on the other images of the
    # batch.
    totals = found.log_probabilities.cpu().double()
    is_caption = totals != IMPOSSIBLE
    trust = ((totals - totals.amax(dim=1, keepdim=True)) / options.consensus).softmax(dim=1).where(is_caption, 0)
    likeness = _likeness(found.tokens.cpu(), options)
    gains = (likeness @ trust[..., None]).squeeze(-1).float().where(is_caption, IMPOSSIBLE)
    kind = found.ended.long().cpu() + is_caption  # 2 ended, 1 cut off, 0 nothing
    order = best_first(gains)
    order = order.gather(1, best_first(kind.gather(1, order))).to(found.tokens.device)
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    values["scores"] = gains.to(found.scores.device)
    ranked: dict[str, Any] = {k: None if v is None else gather_rows(v, order) for k, v in values.items()}
    return SearchResult(**ranked)


def _likeness(tokens: Tensor, options: SearchOptions) -> Tensor:
    """Return how alike any two captions (B, R, T) of an image are: (B, R, R) float64."""
    first = 1 + max(options.pad_id, options.bos_id, options.eos_id, *options.suppressed_ids)
    distinct, said = tokens.unique(return_inverse=True)
    weights = (distinct - first + 1).clamp(min=1).double().log()
    words = weights.new_zeros(*tokens.shape[:2], len(distinct)).scatter_(2, said, weights[said])
    totals = words.sum(dim=-1)
    likeness = 2 * (words @ (words > 0).double().mT)
    likeness /= (totals[:, :, None] + totals[:, None]).clamp(min=torch.finfo(torch.float64).tiny)
    likeness.diagonal(dim1=1, dim2=2).fill_(1)
    return likeness
