"""Additive attention.

Shapes: B images, R captions or beams of an image, N cells, C channels, H state width, A attention width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdditiveAttention(nn.Module):
    """Soft attention over cells, Bahdanau et al. (2015) as used by Xu et al., Show, Attend and Tell (2015).

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

    def keys(self, features: Tensor) -> Tensor:
        """Return keys (B, N, A) of features (B, N, C): once an image, however many words look at it."""
        keys: Tensor = self.key(features)
        return keys

    def forward(self, features: Tensor, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Look at the cells.

        Args:
            features: (B, N, C).
            keys: (B, N, A) from `keys`.
            hidden: (B, R, H).

        Returns:
            Context (B, R, C), and weights (B, R, N) that sum to one over the cells.
        """
        together = torch.tanh(keys[:, None] + self.query(hidden)[:, :, None])
        weights = self.score(together)[..., 0].softmax(dim=-1)
        return torch.bmm(weights.to(features.dtype), features), weights
