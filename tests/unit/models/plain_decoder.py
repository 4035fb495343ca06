"""The decoder written the slow, plain way, as the textbook computes it; the LSTM is torch's.

It computes with the weights of a decoder of capdist, but with none of its methods: caption-major, keys and head anew
for every word.

Shapes: N cells, C channels, H state width, T words, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def plain_forward(decoder: Any, features: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Read captions.

    Args:
        decoder: Of capdist.
        features: (rows, N, C), or (images, N, C) of captions that lie side by side.
        input_ids: (rows, T).

    Returns:
        Logits (rows, T, V) and attention (rows, T, N).
    """
    repeated = features.repeat_interleave(len(input_ids) // len(features), dim=0)
    mean = repeated.sum(dim=1) / repeated.shape[1]
    hidden, cell = decoder.initial_hidden(mean).tanh(), decoder.initial_cell(mean).tanh()
    logits, looked = [], []
    for position in range(input_ids.shape[1]):
        context, weights = _look(decoder.attention, repeated, hidden)
        if decoder.gate is not None:
            context = context / (1 + torch.exp(-decoder.gate(hidden)))
        word = decoder.embedding(input_ids[:, position])
        hidden, cell = decoder.lstm(torch.cat([word, context], dim=1), (hidden, cell))
        logits.append(decoder.head(hidden))
        looked.append(weights)
    return torch.stack(logits, dim=1), torch.stack(looked, dim=1)


def plain_caption(decoder: Any, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (T, V) and attention (T, N) of one caption: features (N, C) and words (T,)."""
    logits, looked = plain_forward(decoder, features[None], words[None])
    return logits[0], looked[0]


def _look(attention: Any, features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return context (rows, C) and weights (rows, N) of Bahdanau et al. from states (rows, H)."""
    energies = attention.score(torch.tanh(attention.key(features) + attention.query(hidden).unsqueeze(1))).squeeze(2)
    weights = energies.exp() / energies.exp().sum(dim=1, keepdim=True)
    return (weights.unsqueeze(2) * features).sum(dim=1), weights
