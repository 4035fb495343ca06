"""The decoder written the slow, plain way: one caption, one word at a time; the LSTM is torch's.

It computes with the weights of a decoder of capdist, but with none of its methods.

Shapes: N cells, C channels, H state width, T words, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Caption = tuple[Tensor, Tensor]
"""Logits (T, V) and attention (T, N)."""


def softmax(energies: Tensor) -> Tensor:
    """Return weights (N,) of scores (N,)."""
    return energies.exp() / energies.exp().sum()


def additive_look(attention: Any, features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return context (C,) and weights (N,) of Bahdanau et al. for features (N, C) and a state (H,)."""
    energies = attention.score(torch.tanh(attention.key(features) + attention.query(hidden))).squeeze(1)
    weights = softmax(energies)
    return sum(weights[cell] * features[cell] for cell in range(len(features))), weights


def soft_attention_caption(decoder: Any, features: Tensor, words: Tensor) -> Caption:
    """Read the words (T,) of a caption as Xu et al. do.

    Args:
        decoder: Of capdist.
        features: (N, C).
        words: (T,).
    """
    hidden = decoder.initial_hidden(features.mean(dim=0)).tanh()
    cell = decoder.initial_cell(features.mean(dim=0)).tanh()
    logits, looked = [], []
    for word in words:
        context, weights = additive_look(decoder.attention, features, hidden)
        if decoder.gate is not None:
            context = context / (1 + torch.exp(-decoder.gate(hidden)))
        hidden, cell = decoder.lstm(torch.cat([decoder.embedding(word), context]), (hidden, cell))
        logits.append(decoder.head(hidden))
        looked.append(weights)
    return torch.stack(logits), torch.stack(looked)
