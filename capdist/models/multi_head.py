"""Multi-head attention.

Shapes: B images, R captions or beams of an image, N cells, C channels, H state width, A attention width.
"""

from __future__ import annotations

from torch import Tensor, nn

from capdist.models.attention import Look, Memory
from capdist.models.deferred import StepMatmul


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention over cells, Vaswani et al., Attention Is All You Need (2017), section 3.2.2.

    A head has A / heads dimensions in which query and keys meet, and C / heads of the values. The context is the heads
    side by side; no matrix mixes them, since that of the LSTM's gates follows. The weights are the mean over heads.

    Args:
        feature_size: C, a multiple of the heads.
        hidden_size: H.
        attention_size: A, a multiple of the heads.
        num_heads: Heads.
    """

    def __init__(self, feature_size: int, hidden_size: int, attention_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # No bias: it would add the same number to the scores of all cells, which changes nothing after the softmax.
        self.key = nn.Linear(feature_size, attention_size, bias=False)
        self.value = nn.Linear(feature_size, feature_size)
        self.query = nn.Linear(hidden_size, attention_size)

    def memory(self, features: Tensor) -> Memory:
        """Return scaled keys (B, heads, N, A / heads) and values (B, heads, N, C / heads) of features (B, N, C)."""
        scale = (self.num_heads / self.key.out_features) ** 0.5
        return self._by_head(self.key(features) * scale).contiguous(), self._by_head(self.value(features)).contiguous()

    def of_rows(self, memory: Memory) -> Look:
        """Return the attention of as many rows for each image: queries (B, R, A) to contexts (B, R, C)."""
        keys, values = memory
        scores, mixed = StepMatmul(keys.mT), StepMatmul(values)

        def look(queries: Tensor) -> tuple[Tensor, Tensor]:
            weights = scores(self._by_head(queries)).softmax(dim=-1)
            return mixed(weights).transpose(1, 2).flatten(2), weights.mean(dim=1)

        return look

    def of_captions(self, memory: Memory, rows: Tensor) -> Look:
        """Return the attention of captions of different lengths: queries (r, A) to contexts (r, C).

        The first r rows look, those whose captions have not ended; the others look with a query of zeros, which costs
        less than to repeat keys and values for the captions of an image.

        Args:
            memory: Of the images.
            rows: (B·R,) which caption each row is, those of an image being numbered side by side.
        """
        look_of_all, num_images = self.of_rows(memory), len(memory[0])

        def look(queries: Tensor) -> tuple[Tensor, Tensor]:
            mine = rows[: len(queries)]
            of_all = queries.new_zeros(len(rows), queries.shape[1]).index_copy(0, mine, queries)
            context, weights = look_of_all(of_all.view(num_images, -1, queries.shape[1]))
            return context.flatten(0, 1)[mine], weights.flatten(0, 1)[mine]

        return look

    def _by_head(self, values: Tensor) -> Tensor:
        """Return (B, heads, …, width / heads) of (B, …, width)."""
        return values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
