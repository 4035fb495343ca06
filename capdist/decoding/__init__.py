"""Caption search: pure functions over a small protocol (`init_state`, `step`, `reorder`, `select`)."""

from __future__ import annotations

from torch import Tensor

from capdist.decoding.beam import beam_search
from capdist.decoding.consensus import agree
from capdist.decoding.greedy import greedy_search
from capdist.decoding.hypotheses import SearchResult
from capdist.decoding.options import SearchOptions
from capdist.decoding.protocol import Decoder, State
from capdist.decoding.sampling import sample

__all__ = ["Decoder", "SearchOptions", "SearchResult", "beam_search", "greedy_search", "sample", "search"]


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
