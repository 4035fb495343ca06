"""Beam search over all images and beams of a batch at once.

Shapes: B images, K beams, V vocabulary, N cells of the encoder grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from capdist.decoding.constraints import IMPOSSIBLE, allowed_log_probabilities
from capdist.decoding.greedy import best_continuations, is_time_to_look
from capdist.decoding.hypotheses import Hypotheses, SearchResult, best_first, gather_rows
from capdist.decoding.options import SearchOptions
from capdist.decoding.protocol import Decoder, State

_WORTH_LEAVING = 0.75
"""Decided images leave the batch once at most this share of its images is undecided."""


class _Continuations(NamedTuple):
    """Beams with one more token; three tensors of one shape, best first."""

    totals: Tensor  # float32, minus infinity where there is none
    parents: Tensor  # the beam continued
    tokens: Tensor


@torch.no_grad()
def beam_search(
    decoder: Decoder[State], features: Tensor, options: SearchOptions, return_attention: bool = False
) -> SearchResult:
    """Follow the `beam_size` most probable beginnings of each image and return the best captions that end.

    Each step ranks the 2K best continuations of an image. Those among the first K that end go to a pool, which keeps
    the K best by score. The K best that do not end are continued; 2K always hold as many, since a beam can end in only
    one way. An image is decided once its pool is full and no beam can still get into it. Log-probabilities only fall,
    so no descendant of a beam scores above its total / (max_length + 1) ** length_penalty. A beam of one is decided by
    its first end, so it is greedy search for any length penalty.

    Args:
        decoder: Gives the probabilities of the next word.
        features: Encoder grid, (B, N, channels).
        options: What may be written and how it is scored.
        return_attention: Also return the attention of every word.

    Returns:
        `beam_size` candidates an image. If the pool has fewer, it is filled up with beams that did not end: after
        `max_length` words, or because no word is allowed.

    Raises:
        UsageError: A token id of the options lies outside the vocabulary.
        NumericsError: A logit was NaN or plus infinity.
    """
    live, pool = _first_beams(features, options, return_attention)
    searching = torch.ones_like(live.ended[:, :1])
    images = torch.arange(len(features), device=features.device)
    over: list[tuple[Tensor, Hypotheses]] = []  # images that have left, and their captions
    first = torch.zeros_like(live.lengths)
    state = decoder.init_state(features)
    tokens = torch.full_like(first[:, :1], options.bos_id)
    for position in range(options.max_length + 1):  # the last step can only end captions of full length
        logits, attention, state = decoder.step(tokens, state)
        if position == 0:  # all beams start alike, so the first is enough
            logits, attention = gather_rows(logits, first), gather_rows(attention, first)
            state = decoder.reorder(state, first)
        log_p = allowed_log_probabilities(logits, live.words, position, options)
        totals = live.totals.masked_fill(~searching, IMPOSSIBLE)
        best = _Continuations(*best_continuations(totals, log_p, 2 * options.beam_size))
        pool = _collect_ended(pool, live, best, options)
        if position == options.max_length:
            break
        live, parents, tokens, stuck = _grow(live, best, attention, position, options)
        searching = searching & ~stuck & ~_is_decided(pool, live, options)
        state = decoder.reorder(state, parents)
        if not is_time_to_look(position, features.device):
            continue
        going = searching[:, 0].nonzero()[:, 0]  # the host waits for the device
        if not len(going):
            break
        if len(going) <= _WORTH_LEAVING * len(searching):
            done = (~searching[:, 0]).nonzero()[:, 0]
            over.append((images[done], pool.join(live).select(done)))
            live, pool, state = live.select(going), pool.select(going), decoder.select(state, going)
            searching, images, tokens = searching[going], images[going], tokens[going]
    over.append((images, pool.join(live)))
    order = torch.cat([left for left, _ in over]).argsort()
    return Hypotheses.cat([captions for _, captions in over]).select(order).result(options.beam_size, options)


def _first_beams(features: Tensor, options: SearchOptions, with_attention: bool) -> tuple[Hypotheses, Hypotheses]:
    """Return the beams at the start, of which only the first holds a caption, and an empty pool."""
    live = Hypotheses.start(features, options.beam_size, options, with_attention)
    pool = Hypotheses.start(features, options.beam_size, options, with_attention)
    live.totals[:, 1:] = IMPOSSIBLE
    pool.totals[:] = IMPOSSIBLE
    return live, pool


def _collect_ended(pool: Hypotheses, live: Hypotheses, best: _Continuations, options: SearchOptions) -> Hypotheses:
    """Return the pool with the captions that end among the first K ranks; remove their beams from `live`."""
    totals, parents, tokens = (field[:, : options.beam_size] for field in best)
    ends = (tokens == options.eos_id) & (totals != IMPOSSIBLE)
    ended = live.take(parents)
    ended.totals = totals.masked_fill(~ends, IMPOSSIBLE)
    ended.ended = ends
    # An image that gets stuck keeps its beams; one that ended must not come back as a caption that did not end.
    beams = torch.arange(options.beam_size, device=parents.device)
    is_over = ((parents.unsqueeze(1) == beams[:, None]) & ends.unsqueeze(1)).any(dim=-1)
    live.totals = live.totals.masked_fill(is_over, IMPOSSIBLE)
    both = pool.join(ended)
    return both.take(best_first(both.scores(options.length_penalty))[:, : options.beam_size])


def _grow(
    live: Hypotheses, best: _Continuations, attention: Tensor, position: int, options: SearchOptions
) -> tuple[Hypotheses, Tensor, Tensor, Tensor]:
    """Continue the beams of each image by the K best continuations that do not end.

    An image that has none is stuck, or was decided before; its beams are not changed.

    Returns:
        The beams, the parent of each (B, K), its last word (B, K), and which images are stuck (B, 1).
    """
    goes_on = (best.tokens != options.eos_id) & (best.totals != IMPOSSIBLE)
    ranks = best_first(goes_on.long())[:, : options.beam_size]
    totals, parents, tokens, goes_on = (field.gather(1, ranks) for field in (*best, goes_on))
    stuck = ~goes_on.any(dim=1, keepdim=True)
    beams = torch.arange(options.beam_size, device=parents.device)
    parents = parents.where(~stuck, beams)
    grown = live.take(parents)
    grown.totals = totals.masked_fill(~goes_on, IMPOSSIBLE).where(~stuck, grown.totals)
    grown.append(goes_on, tokens, gather_rows(attention, parents), position)
    return grown, parents, tokens, stuck


def _is_decided(pool: Hypotheses, live: Hypotheses, options: SearchOptions) -> Tensor:
    """Return which images have a full pool that no beam can get into any more, (B, 1) bool."""
    worst = pool.scores(options.length_penalty)[:, -1:]  # minus infinity while the pool has room
    if options.beam_size == 1:
        return worst != IMPOSSIBLE
    longest = float(options.max_length + 1)
    bound = live.totals.amax(dim=1, keepdim=True) / longest**options.length_penalty
    return bound <= worst
