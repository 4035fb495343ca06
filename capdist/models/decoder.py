"""The LSTM decoder with soft attention.

Shapes: B images, R captions or beams of an image, T words, N cells, C channels, H state width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capdist.models.attention import AdditiveAttention


@dataclass(frozen=True)
class DecoderState:
    """What the decoder carries from word to word.

    Attributes:
        features: (B, N, C), never repeated for the captions of an image.
        keys: (B, N, A), likewise.
        hidden: (B, R, H).
        cell: (B, R, H).
    """

    features: Tensor
    keys: Tensor
    hidden: Tensor
    cell: Tensor

    def select(self, images: Tensor) -> DecoderState:
        """Return one row for each index of `images`, with features and keys of its own."""
        return DecoderState(*(getattr(self, field.name)[images] for field in fields(self)))

    def first(self, count: int) -> DecoderState:
        """Keep the first images."""
        return DecoderState(*(getattr(self, field.name)[:count] for field in fields(self)))


def by_length(lengths: Tensor) -> Tensor:
    """Return the rows from the longest caption to the shortest, those of equal length in their order."""
    return lengths.argsort(descending=True, stable=True)


def words_at(lengths: Tensor) -> list[int]:
    """Return how many captions have a first word, a second, and so on."""
    positions = torch.arange(int(lengths.max()), device=lengths.device)
    counts: list[int] = (lengths[None] > positions[:, None]).sum(dim=1).tolist()
    return counts


def pack(values: Tensor, lengths: Tensor) -> Tensor:
    """Pick the words of captions: all first words, longest caption first, then all second words, and so on.

    Args:
        values: (rows, T).
        lengths: (rows,) words of each row.

    Returns:
        (W,), W the sum of lengths.
    """
    rows = by_length(lengths)
    positions = torch.arange(values.shape[1], device=values.device)
    return values[rows].T[lengths[rows][None] > positions[:, None]]


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
        mean = features.mean(dim=1, keepdim=True)
        hidden, cell = torch.tanh(self.initial_hidden(mean)), torch.tanh(self.initial_cell(mean))
        return DecoderState(features, self.attention.keys(features), hidden, cell)

    def reorder(self, state: DecoderState, parents: Tensor) -> DecoderState:
        """Let row r of each image go on from its row `parents[b, r]`; parents is (B, new R)."""
        index = parents[..., None].expand(-1, -1, state.hidden.shape[-1])
        return replace(state, hidden=state.hidden.gather(1, index), cell=state.cell.gather(1, index))

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, DecoderState]:
        """Read one word for each row.

        Args:
            tokens: (B, R) ids of the words just said.
            state: With R rows.

        Returns:
            Logits (B, R, V) of the next word, attention (B, R, N), and the new state.
        """
        attention, state = self._advance(self._word_gates(tokens), state)
        return self.head(self.dropout(state.hidden)), attention, state

    def forward(self, features: Tensor, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Read whole captions (teacher forcing), longest first, so that a caption that has ended costs nothing.

        Args:
            features: (B, N, C).
            input_ids: (B·R, T), starting with `<bos>`, the captions of an image side by side.
            lengths: (B·R,) words to read of each caption; 0 leaves a row out.

        Returns:
            States (W, H) after dropout, ready for `head`, one for each of the W words that `pack` picks and in its
            order; and the attention that each cell of each row got from all its words, (B·R, N).
        """
        rows = by_length(lengths)
        state = self.init_state(features)
        state = state.select(rows // (len(lengths) // len(features)))
        # A process left without captions takes the step all the same, with no rows.
        counts = words_at(lengths) or [0]
        # The word half of the gates does not wait for the state: all words in one product.
        word_gates = self._word_gates(pack(input_ids, lengths)).split(counts)
        hidden, looked = [], torch.zeros(len(lengths), features.shape[1], device=features.device)
        for count, gates in zip(counts, word_gates, strict=True):
            weights, state = self._advance(gates[:, None], state.first(count))
            hidden.append(state.hidden[:, 0])
            looked = torch.cat([looked[:count] + weights[:, 0], looked[count:]])
        return self.dropout(torch.cat(hidden)), looked[rows.argsort()]

    def _word_gates(self, tokens: Tensor) -> Tensor:
        """Return the share of words in the LSTM's gates, (…, 4H), for ids (…)."""
        words = self.dropout(self.embedding(tokens))
        weight = self.lstm.weight_ih[:, : self.embedding.embedding_dim]
        return F.linear(words, weight, self.lstm.bias_ih + self.lstm.bias_hh)

    def _advance(self, word_gates: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        context, weights = self.attention(state.features, state.keys, state.hidden)
        if self.gate is not None:
            context = context * torch.sigmoid(self.gate(state.hidden))
        context_weight = self.lstm.weight_ih[:, self.embedding.embedding_dim :]
        gates = word_gates + F.linear(context, context_weight) + F.linear(state.hidden, self.lstm.weight_hh)
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=-1)
        cell = torch.sigmoid(forget_gate) * state.cell + torch.sigmoid(input_gate) * torch.tanh(candidate)
        hidden = torch.sigmoid(output_gate) * torch.tanh(cell)
        return weights, replace(state, hidden=hidden, cell=cell)
