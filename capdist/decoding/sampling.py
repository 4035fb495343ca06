"""Captions drawn at random from the model.

Shapes: B images, R samples of an image, V vocabulary, N cells of the encoder grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from capdist.decoding.greedy import follow
from capdist.decoding.hypotheses import SearchResult
from capdist.decoding.options import SearchOptions
from capdist.decoding.protocol import Decoder, State
from capdist.errors import UsageError


@torch.no_grad()
def sample(
    decoder: Decoder[State],
    features: Tensor,
    options: SearchOptions,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    return_attention: bool = False,
) -> SearchResult:
    """Draw captions, each independent of the others; the same one may come twice.

    Each word is drawn among the allowed ones, from the model's distribution sharpened by the temperature,
    then cut to the `top_k` most probable tokens, then to the fewest that together have probability `top_p`
    (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).

    Args:
        decoder: The captioner.
        features: Encoder grid, (B, N, channels).
        options: What may be written and how it is scored; `beam_size` is ignored.
        num_samples: Captions an image (R).
        temperature: Divides the logits: below 1 the probable becomes more so, above 1 less.
        top_k: Most tokens to draw among; 0 for all.
        top_p: Probability to draw among, above 0 and at most 1.
        generator: Source of randomness, on the device of `features`; None for torch's own.
        return_attention: Also return the attention of every word.

    Returns:
        `num_samples` candidates an image. They are sorted: for one fair draw ask for one. Log-probabilities
        and scores are the model's own, before temperature, `top_k` and `top_p`, as those of a search are.

    Raises:
        UsageError: An argument that makes no sense, or a token id outside the vocabulary.
        NumericsError: A logit was NaN or plus infinity.
    """
    mistakes = [*_mistakes(num_samples, temperature, top_k, top_p, generator, features.device)]
    if mistakes:
        raise UsageError(*mistakes)

    def choose(log_p: Tensor, totals: Tensor) -> Tensor:
        return _draw(log_p, temperature, top_k, top_p, generator)

    return follow(decoder, features, options, num_samples, choose, return_attention)


def _draw(log_p: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Draw one token a row, (B, R), from log p (B, R, V); rows in which nothing is allowed get any token."""
    vocabulary = log_p.shape[-1]
    if top_k == 0 and top_p == 1:  # nothing to cut off, so nothing to rank; the shift is explained below
        probabilities = ((log_p - log_p.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
        return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(dim=-1)
    best, tokens = log_p.topk(min(top_k or vocabulary, vocabulary), dim=-1)
    # Most probable first and shifted to 0, so that a temperature near 0 overflows in the others only.
    probabilities = ((best - best[..., :1]) / temperature).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # 0 for the first, which therefore always stays
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    # argmax of p / Exp(1) is a draw from p, and unlike torch.multinomial it never waits for the device.
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    rank = (probabilities / noise).argmax(dim=-1, keepdim=True)
    return tokens.gather(-1, rank).squeeze(-1)


def _mistakes(
    num_samples: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
    device: torch.device,
) -> Iterator[str]:
    if num_samples < 1:
        yield f"num_samples: {num_samples} must be 1 or more"
    if not (math.isfinite(temperature) and temperature > 0):
        yield f"temperature: {temperature} must be a finite number above 0; greedy search is the limit at 0"
    if top_k < 0:
        yield f"top_k: {top_k} must be 1 or more, or 0 for all tokens"
    if not 0 < top_p <= 1:
        yield f"top_p: {top_p} must be above 0 and at most 1"
    if generator is not None and generator.device.type != device.type:
        yield f"generator: on {generator.device}, features on {device}; use torch.Generator('{device}')"
