"""From features to captions: the one way, for validation, `Captioner`, and search grids.

Shapes: B images, N cells, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from capdist.decoding import Decoder, SearchOptions, search
from capdist.text.tokenizer import detokenize
from capdist.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class Caption:
    """A caption of a photo.

    Attributes:
        text: As a person would write it.
        log_probability: Sum over its words and `<eos>`, natural logarithm.
        words: The tokens that the model wrote.
        attention: (words, cells) what each word looked at, row by row of the grid; None unless asked for.
    """

    text: str
    log_probability: float
    words: tuple[str, ...]
    attention: Tensor | None = None


def write_captions(
    model: Decoder[Any],
    features: Tensor,
    vocabulary: Vocabulary,
    options: SearchOptions,
    *,
    return_attention: bool = False,
) -> list[Caption]:
    """Search the best caption of each image.

    Args:
        model: A `CaptionModel` or an `Ensemble`, in evaluation mode.
        features: (B, N, C) that the model's `encode` made.
        vocabulary: Turns ids into words.
        options: How captions are searched.
        return_attention: Whether to also return what each word looked at.

    Returns:
        One caption an image, in their order.
    """
    found = search(model, features, options, return_attention=return_attention)
    captions = []
    for row, (tokens, log_p) in enumerate(
        zip(found.tokens[:, 0].tolist(), found.log_probabilities[:, 0].tolist(), strict=True)
    ):
        words = tuple(vocabulary.decode(tokens))
        attention = None if found.attention is None else found.attention[row, 0, : len(words)].float().cpu()
        captions.append(Caption(detokenize(words), log_p, words, attention))
    return captions
