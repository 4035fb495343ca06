"""Greedy search, and the loop that it shares with sampling: each row is continued on its own.

Shapes: B images, R rows of an image, V vocabulary, N cells of the encoder grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from capdist.decoding.constraints import IMPOSSIBLE, allowed_log_probabilities
from capdist.decoding.hypotheses import Hypotheses, SearchResult
from capdist.decoding.options import SearchOptions
from capdist.decoding.protocol import Decoder, State

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
