"""Additive attention.

Shapes: B images, R captions or beams of an image, N cells, C channels, H state width, A attention width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from capdist.models.deferred import StepSigmoidDot

Look = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From the queries of rows to their contexts, and to weights over the cells that sum to one."""

Memory = tuple[Tensor, Tensor]
"""What an attention looks at, (B, …) each: made once an image, however many words of however many rows look at it."""


class AdditiveAttention(nn.Module):
    """Soft attention over cells, Bahdanau et al. (2015) as used by Xu et al., Show, Attend and Tell (2015).

    The score of a cell is `v · tanh(key + query)`. Computed is `2 v · sigmoid(2 key + 2 query)`: more by the sum of v
    for every cell, which the softmax does not see, and processors are much faster at a sigmoid.

    Args:
        feature_size: C.
        hidden_size: H.
        attention_size: A.
    """

    def __init__(self, feature_size: int, hidden_size: int, attention_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(feature_size, attention_size)
        self.query = nn.Linear(hidden_size, attention_size)
        # No bias: adding the same number to the scores of all cells changes nothing after the softmax.
        self.score = nn.Linear(attention_size, 1, bias=False)

    def memory(self, features: Tensor) -> Memory:
        """Return features (B, N, C) as they are, and their doubled keys (B, N, A)."""
        return features, 2 * self.key(features)

    def of_rows(self, memory: Memory) -> Look:
        """Return the attention of as many rows for each image: queries (B, R, A) to contexts (B, R, C)."""
        features, keys = memory
        vector = 2 * self.score.weight[0].to(keys.dtype)

        def look(queries: Tensor) -> tuple[Tensor, Tensor]:
            scores = (keys[:, None] + 2 * queries[:, :, None]).sigmoid_() @ vector
            weights = scores.softmax(dim=-1)
            return torch.bmm(weights.to(features.dtype), features), weights

        return look

    def of_captions(self, memory: Memory, rows: Tensor) -> Look:
        """Return the attention of captions of different lengths: queries (r, A) to contexts (r, C).

        The first r rows look, those whose captions have not ended. Neither features nor their gradients are ever
        repeated for the captions of an image.

        Args:
            memory: Of the images.
            rows: (B·R,) which caption each row is, those of an image being numbered side by side.
        """
        features, keys = memory
        num_captions = len(rows) // len(features)
        scores = StepSigmoidDot(keys[rows // num_captions], 2 * self.score.weight[0])

        def look(queries: Tensor) -> tuple[Tensor, Tensor]:
            weights = scores(2 * queries).softmax(dim=-1)
            mine = rows[: len(queries)]
            of_all = weights.new_zeros(len(rows), weights.shape[1]).index_copy(0, mine, weights)
            of_images = of_all.view(len(features), num_captions, -1).to(features.dtype)
            return torch.bmm(of_images, features).flatten(0, 1)[mine], weights

        return look
