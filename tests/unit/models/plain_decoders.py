"""The decoders written the slow, plain way: one caption, one word, one head at a time; the LSTMs are torch's.

They compute with the weights of a decoder of capdist, but with none of its methods.

Shapes: N cells, C channels, H state width, T words, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def multi_head_look(attention: Any, features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return context (C,) and mean weights (N,) of Vaswani et al., equation 1, head by head."""
    queries = attention.query(hidden).chunk(attention.num_heads)
    keys = (features @ attention.key.weight.T).chunk(attention.num_heads, dim=1)
    values = attention.value(features).chunk(attention.num_heads, dim=1)
    of_heads = [softmax(key @ query / math.sqrt(len(query))) for query, key in zip(queries, keys, strict=True)]
    context = torch.cat([weights @ value for weights, value in zip(of_heads, values, strict=True)])
    return context, sum(of_heads) / len(of_heads)


def soft_attention_caption(decoder: Any, features: Tensor, words: Tensor, masks: Sequence[Tensor] = ()) -> Caption:
    """Read the words (T,) of a caption as Xu et al. do.

    Args:
        decoder: Of capdist.
        features: (N, C).
        words: (T,).
        masks: (H,), by which the hidden state of the step before is multiplied.
    """
    look = multi_head_look if hasattr(decoder.attention, "num_heads") else additive_look
    hidden = decoder.initial_hidden(features.mean(dim=0)).tanh()
    cell = decoder.initial_cell(features.mean(dim=0)).tanh()
    logits, looked = [], []
    for word in words:
        before = hidden * masks[0] if masks else hidden
        context, weights = look(decoder.attention, features, before)
        if decoder.gate is not None:
            context = context / (1 + torch.exp(-decoder.gate(before)))
        hidden, cell = decoder.lstm(torch.cat([decoder.embedding(word), context]), (before, cell))
        logits.append(decoder.head(hidden))
        looked.append(weights)
    return torch.stack(logits), torch.stack(looked)


def up_down_caption(decoder: Any, features: Tensor, words: Tensor, masks: Sequence[Tensor] = ()) -> Caption:
    """Read the words (T,) of a caption as Anderson et al. do, equations 2 to 8.

    Args:
        decoder: Of capdist.
        features: (N, C).
        words: (T,).
        masks: (H,) each, by which the hidden states of the step before are multiplied, first that of the language LSTM.
    """
    zeros = features.new_zeros(decoder.head.in_features)
    h1, c1, h2, c2 = zeros, zeros, zeros, zeros
    logits, looked = [], []
    for word in words:
        if masks:
            h2, h1 = h2 * masks[0], h1 * masks[1]
        x1 = torch.cat([h2, features.mean(dim=0), decoder.embedding(word)])
        h1, c1 = decoder.attention_lstm(x1, (h1, c1))
        context, weights = additive_look(decoder.attention, features, h1)
        h2, c2 = decoder.language_lstm(torch.cat([context, h1]), (h2, c2))
        logits.append(decoder.head(h2))
        looked.append(weights)
    return torch.stack(logits), torch.stack(looked)
