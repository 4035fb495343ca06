"""The LSTM decoder with soft attention.

Shapes: B images, R captions or beams of an image, T words, N cells, C channels, H state width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capdist.models.attention import AdditiveAttention, Look
from capdist.models.deferred import StepLinear


class _Products(NamedTuple):
    """Linear layers of a step."""

    of_hidden: StepLinear  # to query, gate of the context and gates of the LSTM
    of_context: StepLinear  # to gates of the LSTM


@dataclass(frozen=True)
class DecoderState:
    """What a search carries from word to word.

    Attributes:
        features: (B, N, C), never repeated for the rows of an image.
        keys: (B, N, A), likewise.
        products: Layers that each step applies.
        hidden: (B, R, H).
        cell: (B, R, H).
    """

    features: Tensor
    keys: Tensor
    products: _Products
    hidden: Tensor
    cell: Tensor


class Packing(NamedTuple):
    """The words of captions: all first words, longest caption first, then all second words, and so on.

    It is worked out on the host, so that a device never has to tell how many captions are left.

    Attributes:
        rows: (rows,) from the longest caption to the shortest, those of equal length in their order.
        words: (W,) where in (rows, T), flattened, each word is.
        counts: How many captions have a first word, a second, and so on.
    """

    rows: Tensor
    words: Tensor
    counts: list[int]

    @classmethod
    def of(cls, lengths: Tensor, width: int, device: torch.device) -> Packing:
        """Pack captions of `lengths` (rows,), on the host, that lie in (rows, `width`); indices go to the device."""
        rows = lengths.argsort(descending=True, stable=True)
        positions = torch.arange(width)
        present = lengths[rows] > positions[:, None]
        words = (rows * width + positions[:, None])[present]
        counts = [count for count in present.sum(dim=1).tolist() if count]
        return cls(rows.to(device, non_blocking=True), words.to(device, non_blocking=True), counts)

    def pick(self, values: Tensor) -> Tensor:
        """Return the words (W,) of `values` (rows, T)."""
        return values.flatten()[self.words]


class SoftAttentionDecoder(nn.Module):
    """LSTM over `word embedding ++ context`, Xu et al., Show, Attend and Tell (2015), section 3.1.2.

    Args:
        feature_size: C.
        vocab_size: V.
        embed_size: Width of a word vector.
        hidden_size: H.
        attention_size: Width of queries and keys.
        dropout: On word vectors and on the state before the head.
        gate: Scale the context by a sigmoid of the state (section 4.2.1).
        tie_weights: Share one matrix between word vectors and head.
        pad_id: Id whose word vector stays zero.
    """

    def __init__(
        self,
        *,
        feature_size: int,
        vocab_size: int,
        embed_size: int,
        hidden_size: int,
        attention_size: int,
        dropout: float,
        gate: bool,
        tie_weights: bool,
        pad_id: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_size, padding_idx=pad_id)
        self.attention = AdditiveAttention(feature_size, hidden_size, attention_size)
        self.gate = nn.Linear(hidden_size, feature_size) if gate else None
        self.initial_hidden = nn.Linear(feature_size, hidden_size)
        self.initial_cell = nn.Linear(feature_size, hidden_size)
        self.lstm = nn.LSTMCell(embed_size + feature_size, hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        with torch.no_grad():
            self.embedding.weight[pad_id].zero_()
        if tie_weights:
            self.head.weight = self.embedding.weight

    def init_state(self, features: Tensor) -> DecoderState:
        """Start one caption an image from the mean of its features (B, N, C)."""
        hidden, cell = self._first_state(features)
        return DecoderState(features, self.attention.keys(features), self._products(), hidden[:, None], cell[:, None])

    def reorder(self, state: DecoderState, parents: Tensor) -> DecoderState:
        """Let row r of each image go on from its row `parents[b, r]`; parents is (B, new R)."""
        index = parents[..., None].expand(-1, -1, state.hidden.shape[-1])
        return replace(state, hidden=state.hidden.gather(1, index), cell=state.cell.gather(1, index))

    def select(self, state: DecoderState, images: Tensor) -> DecoderState:
        """Keep some images (kept,) of a search."""
        tensors = ("features", "keys", "hidden", "cell")
        return replace(state, **{name: getattr(state, name)[images] for name in tensors})

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, DecoderState]:
        """Read one word for each row.

        Args:
            tokens: (B, R) ids of the words just said.
            state: With R rows.

        Returns:
            Logits (B, R, V) of the next word, attention (B, R, N), and the new state.
        """
        look = self.attention.of_rows(state.features, state.keys)
        attention, hidden, cell = self._advance(
            self._word_gates(tokens), state.hidden, state.cell, look, state.products
        )
        return self.head(self.dropout(hidden)), attention, replace(state, hidden=hidden, cell=cell)

    def forward(self, features: Tensor, input_ids: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """Read whole captions (teacher forcing), longest first, so that a caption that has ended costs nothing.

        Args:
            features: (B, N, C).
            input_ids: (B·R, T), starting with `<bos>`, the captions of an image side by side.
            packing: Of the words to read of each caption.

        Returns:
            States (W, H) after dropout, ready for `head`, one for each of the W words that `packing` picks and in its
            order; and the attention that each cell of each row got from all its words, (B·R, N).
        """
        rows = packing.rows
        look = self.attention.of_captions(features, self.attention.keys(features), rows)
        image = rows // (len(rows) // len(features))
        hidden, cell = (state[image] for state in self._first_state(features))
        products = self._products()
        # A process left without captions takes the step all the same, with no rows.
        counts = packing.counts or [0]
        # The word half of the gates does not wait for the state: all words in one product.
        word_gates = self._word_gates(packing.pick(input_ids)).split(counts)
        said, looked = [], []
        for count, gates in zip(counts, word_gates, strict=True):
            weights, hidden, cell = self._advance(gates, hidden[:count], cell[:count], look, products)
            said.append(hidden)
            looked.append(weights)
        by_row = torch.zeros(len(rows), features.shape[1], device=features.device, dtype=looked[0].dtype)
        by_row = by_row.index_add(0, torch.cat([rows[:count] for count in counts]), torch.cat(looked))
        return self.dropout(torch.cat(said)), by_row

    def _first_state(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean = features.mean(dim=1)
        return torch.tanh(self.initial_hidden(mean)), torch.tanh(self.initial_cell(mean))

    def _products(self) -> _Products:
        layers: list[Any] = [self.attention.query] if self.gate is None else [self.attention.query, self.gate]
        of_hidden = StepLinear(
            torch.cat([*(layer.weight for layer in layers), self.lstm.weight_hh]),
            torch.cat([*(layer.bias for layer in layers), self.lstm.bias_hh]),
        )
        return _Products(of_hidden, StepLinear(self.lstm.weight_ih[:, self.embedding.embedding_dim :]))

    def _word_gates(self, tokens: Tensor) -> Tensor:
        """Return the share of words in the LSTM's gates, (…, 4H), for ids (…)."""
        words = self.dropout(self.embedding(tokens))
        return F.linear(words, self.lstm.weight_ih[:, : self.embedding.embedding_dim], self.lstm.bias_ih)

    def _advance(
        self, word_gates: Tensor, hidden: Tensor, cell: Tensor, look: Look, products: _Products
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the rows look at, and their next hidden and cell."""
        gate_size, query_size = 4 * self.lstm.hidden_size, self.attention.query.out_features
        of_hidden = products.of_hidden(hidden)
        query, context_gate, hidden_gates = of_hidden.split(
            [query_size, of_hidden.shape[-1] - query_size - gate_size, gate_size], dim=-1
        )
        context, weights = look(query)
        if self.gate is not None:
            context = context * torch.sigmoid(context_gate)
        gates = word_gates + hidden_gates + products.of_context(context)
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=-1)
        cell = torch.sigmoid(forget_gate) * cell + torch.sigmoid(input_gate) * torch.tanh(candidate)
        return weights, torch.sigmoid(output_gate) * torch.tanh(cell), cell
