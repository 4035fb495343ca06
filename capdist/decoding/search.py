"""The searches: greedy, sampling and beam, each over all rows of a batch at once.

Shapes: B images, R rows of an image, K beams, V vocabulary, N cells of the encoder grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from capdist.decoding.consensus import agree
from capdist.decoding.constraints import IMPOSSIBLE, allowed_log_probabilities
from capdist.decoding.hypotheses import Hypotheses, SearchResult, best_first, gather_rows
from capdist.decoding.options import SearchOptions
from capdist.decoding.protocol import Decoder, State


def search(
    decoder: Decoder[State], features: Tensor, options: SearchOptions, return_attention: bool = False
) -> SearchResult:
    """Find the best captions: greedy search for a beam of one, beam search for a wider one.

    Args:
        decoder: Gives the probabilities of the next word.
        features: Encoder grid, (images, cells, channels).
        options: What may be written and how it is scored.
        return_attention: Also return the attention of every word.

    Returns:
        `options.beam_size` candidates an image, best first: by score, or with `options.consensus` by agreement.

    Raises:
        UsageError: A token id of the options lies outside the vocabulary.
        NumericsError: A logit was NaN or plus infinity.
    """
    find = greedy_search if options.beam_size == 1 else beam_search
    found = find(decoder, features, options, return_attention)
    # With two captions, each agrees with the other to the same degree.
    return found if options.consensus is None or options.beam_size < 3 else agree(found, options)


# --- greedy, and rows that never meet ------------------------------------------------------------


Choose = Callable[[Tensor, Tensor], Tensor]
"""From log p of the next token (B, R, V) and the totals so far (B, R) to the next token (B, R)."""


STEPS_BETWEEN_LOOKS = {"cpu": 1}
"""Steps between checks for finished captions; a check is free on a CPU and makes the host wait for a GPU."""


@torch.no_grad()
def greedy_search(
    decoder: Decoder[State], features: Tensor, options: SearchOptions, return_attention: bool = False
) -> SearchResult:
    """Write the most probable next word until `<eos>` is more probable than any word, or `max_length`.

    Args:
        decoder: Gives the probabilities of the next word.
        features: Encoder grid, (B, N, channels).
        options: What may be written; `beam_size` is ignored.
        return_attention: Also return the attention of every word.

    Returns:
        One candidate an image. A caption that is not over after `max_length` words, or has no allowed word left, is
        returned as not ended.

    Raises:
        UsageError: A token id of the options lies outside the vocabulary.
        NumericsError: A logit was NaN or plus infinity.
    """
    return follow(decoder, features, options, 1, _most_probable, return_attention)


def follow(
    decoder: Decoder[State],
    features: Tensor,
    options: SearchOptions,
    rows: int,
    choose: Choose,
    return_attention: bool,
) -> SearchResult:
    """Write `rows` independent captions an image, one chosen token a step.

    Args:
        decoder: Gives the probabilities of the next word.
        features: Encoder grid, (B, N, channels).
        options: What may be written.
        rows: How many captions each image gets.
        choose: Chooses the next token of every row.
        return_attention: Also return the attention of every word.

    Returns:
        `rows` candidates an image, best first.
    """
    live = Hypotheses.start(features, rows, options, return_attention)
    going = torch.ones_like(live.ended)
    state = decoder.reorder(decoder.init_state(features), torch.zeros_like(live.lengths))
    tokens = torch.full_like(live.lengths, options.bos_id)
    for position in range(options.max_length + 1):  # the last step can only end a caption of full length
        logits, attention, state = decoder.step(tokens, state)
        log_p = allowed_log_probabilities(logits, live.words, position, options)
        tokens = choose(log_p, live.totals)
        gain = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        going = going & (gain != IMPOSSIBLE)
        ending = going & (tokens == options.eos_id)
        going = going & ~ending & (position < options.max_length)
        live.totals = (live.totals + gain).where(ending | going, live.totals)
        live.ended |= ending
        if position < options.max_length:
            live.append(going, tokens, attention, position)
        if is_time_to_look(position, features.device) and not going.any():
            break
    return live.result(rows, options)


def is_time_to_look(position: int, device: torch.device) -> bool:
    """Return whether the host checks for finished captions after this step."""
    return (position + 1) % STEPS_BETWEEN_LOOKS.get(device.type, 4) == 0


def best_continuations(totals: Tensor, log_p: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rank the continuations of all rows of an image together.

    Args:
        totals: Log-probability of each row so far, (B, R).
        log_p: Log-probability of each next token, (B, R, V).
        count: How many to return, at most R * V.

    Returns:
        Totals, rows continued and tokens, each (B, count), best first; impossible ones come last.
    """
    vocabulary = log_p.shape[-1]
    best, index = (totals.unsqueeze(-1) + log_p).flatten(1).topk(count, dim=1)
    return best, index // vocabulary, index % vocabulary


def _most_probable(log_p: Tensor, totals: Tensor) -> Tensor:
    # Selects as a beam of one does, not by argmax: ties, common in bfloat16, must be decided in the same way.
    return best_continuations(totals, log_p, 2)[2][:, :1]


# --- sampling ------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    decoder: Decoder[State],
    features: Tensor,
    options: SearchOptions,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> SearchResult:
    """Draw captions, each independent of the others; the same one may come twice.

    Args:
        decoder: Gives the probabilities of the next word.
        features: Encoder grid, (B, N, channels).
        options: What may be written and how it is scored; `beam_size` is ignored.
        num_samples: R, how many captions to draw for each image.
        generator: Source of randomness, on the device of `features`; None for torch's own.

    Returns:
        `num_samples` candidates an image. They are sorted by score, so ask for one sample if you need a single fair
        draw.

    Raises:
        UsageError: A token id outside the vocabulary.
        NumericsError: A logit was NaN or plus infinity.
    """

    def choose(log_p: Tensor, totals: Tensor) -> Tensor:
        # Softmax again: the allowed tokens may all be less probable than float32 can hold. argmax of p / Exp(1) is a
        # draw from p, and unlike torch.multinomial it never waits for the device.
        return (log_p.softmax(dim=-1) / torch.empty_like(log_p).exponential_(generator=generator)).argmax(dim=-1)

    return follow(decoder, features, options, num_samples, choose, return_attention=False)


# --- beam search ---------------------------------------------------------------------------------


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
