"""Attention: which cells of the grid a word looks at.

A new attention is one class: subclass `Attention`, and give it a line in `ATTENTIONS`.

Shapes: B images, R captions or beams of an image, N cells, C channels, H state width, A attention width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from capdist.models.fast.step_products import StepSigmoidDot

Look = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Takes the queries of rows; returns their contexts, and their weights over the cells, which sum to one."""

Score = Callable[[Tensor], Tensor]
"""Takes the queries (r, A) of the first r rows; returns the scores of their cells (r, N)."""


class Memory(NamedTuple):
    """What a search looks at. It is computed once for each image and serves all words of all beams.

    Attributes:
        features: (B, N, C), whose weighted mean is the context.
        keys: (B, N, A), which queries are compared with. How they are scaled is private to the attention.
    """

    features: Tensor
    keys: Tensor


class Attention(nn.Module, ABC):
    """Soft attention over cells. A subclass says how well a query fits a key.

    Args:
        feature_size: C, the number of channels of a cell.
        hidden_size: H, the width of the state that queries are made of.
        attention_size: A, the number of values in a key or a query.

    Attributes:
        query: Makes a query (A,) of a state (H,). The decoder joins it with its own layers of the state into one
            product, so it must be an `nn.Linear` with a bias.
    """

    query: nn.Linear

    def __init__(self, feature_size: int, hidden_size: int, attention_size: int) -> None:
        super().__init__()

    @abstractmethod
    def keys(self, features: Tensor) -> Tensor:
        """Return the keys (B, N, A) of features (B, N, C)."""

    @abstractmethod
    def scores(self, keys: Tensor, queries: Tensor) -> Tensor:
        """Return the scores (…, N), before the softmax, of keys (…, N, A) for queries (…, A)."""

    def scores_of_steps(self, keys: Tensor) -> Score:
        """Return a function that scores the same keys (rows, N, A) at every step of a loop over words.

        Override it where knowing all steps in advance allows a faster gradient; see `capdist.models.fast`.
        """
        return lambda queries: self.scores(keys[: len(queries)], queries)

    def memory(self, features: Tensor) -> Memory:
        """Return what a search looks at, for features (B, N, C)."""
        return Memory(features, self.keys(features))

    def select(self, memory: Memory, images: Tensor) -> Memory:
        """Keep the memory of some images (kept,)."""
        return Memory(*(values[images] for values in memory))

    def for_search(self, memory: Memory) -> Look:
        """Return the attention of R rows an image: queries (B, R, A) to contexts (B, R, C) and weights (B, R, N)."""

        def look(queries: Tensor) -> tuple[Tensor, Tensor]:
            weights = self.scores(memory.keys[:, None], queries).softmax(dim=-1)
            return torch.bmm(weights.to(memory.features.dtype), memory.features), weights

        return look

    def for_training(self, memory: Memory, rows: Tensor) -> Look:
        """Return the attention of captions of different lengths: queries (r, A) to contexts (r, C), weights (r, N).

        The first r rows look: those whose captions have not ended. Features are never copied for the captions of an
        image, and neither are their gradients.

        Args:
            memory: What `memory` returned for the B images.
            rows: (B·R,) number of the caption that each row reads; the captions of an image have neighbouring numbers.
        """
        features, keys = memory
        num_captions = len(rows) // len(features)
        scores = self.scores_of_steps(keys[rows // num_captions])

        def look(queries: Tensor) -> tuple[Tensor, Tensor]:
            weights = scores(queries).softmax(dim=-1)
            mine = rows[: len(queries)]
            of_all = weights.new_zeros(len(rows), weights.shape[1]).index_copy(0, mine, weights)
            of_images = of_all.view(len(features), num_captions, -1).to(features.dtype)
            return torch.bmm(of_images, features).flatten(0, 1)[mine], weights

        return look


class AdditiveAttention(Attention):
    """Bahdanau et al., Neural Machine Translation by Jointly Learning to Align and Translate (2015).

    Xu et al., Show, Attend and Tell (2015), use it over the cells of a photo. The score of a cell is
    `v · tanh(key + query)`. We compute `2 v · sigmoid(2 key + 2 query)`: since tanh(x) = 2 sigmoid(2x) - 1,
    it is larger by the sum of v for every cell, which the softmax ignores. Processors compute a sigmoid much faster.
    """

    def __init__(self, feature_size: int, hidden_size: int, attention_size: int) -> None:
        super().__init__(feature_size, hidden_size, attention_size)
        self.key = nn.Linear(feature_size, attention_size)
        self.query = nn.Linear(hidden_size, attention_size)
        # No bias: adding the same number to the scores of all cells changes nothing after the softmax.
        self.score = nn.Linear(attention_size, 1, bias=False)

    def keys(self, features: Tensor) -> Tensor:
        """Return keys, doubled once here instead of at every word; see `Attention.keys`."""
        return 2 * self.key(features)

    def scores(self, keys: Tensor, queries: Tensor) -> Tensor:
        """See `Attention.scores`."""
        return (keys + 2 * queries[..., None, :]).sigmoid_() @ self._vector(keys)

    def scores_of_steps(self, keys: Tensor) -> Score:
        """See `Attention.scores_of_steps`; the gradients of all words are summed in one pass."""
        dot = StepSigmoidDot(keys, self._vector(keys))
        return lambda queries: dot(2 * queries)

    def _vector(self, keys: Tensor) -> Tensor:
        return 2 * self.score.weight[0].to(keys.dtype)


class DotAttention(Attention):
    """Scaled dot products, Vaswani et al., Attention Is All You Need (2017), section 3.2.1, with one head."""

    def __init__(self, feature_size: int, hidden_size: int, attention_size: int) -> None:
        super().__init__(feature_size, hidden_size, attention_size)
        self.key = nn.Linear(feature_size, attention_size)
        self.query = nn.Linear(hidden_size, attention_size)

    def keys(self, features: Tensor) -> Tensor:
        """See `Attention.keys`."""
        return self.key(features)

    def scores(self, keys: Tensor, queries: Tensor) -> Tensor:
        """See `Attention.scores`."""
        return (keys * queries[..., None, :]).sum(dim=-1) * keys.shape[-1] ** -0.5


ATTENTIONS: dict[str, type[Attention]] = {"additive": AdditiveAttention, "dot": DotAttention}
"""Attentions that `decoder.attention` names."""
