"""Captions drawn at random from the model.

Shapes: B images, R samples of an image, V vocabulary, N cells of the encoder grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capdist.decoding.greedy import follow
from capdist.decoding.hypotheses import SearchResult
from capdist.decoding.options import SearchOptions
from capdist.decoding.protocol import Decoder, State


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
