"""The LSTM decoder with soft attention.

Shapes: B images, R captions or beams of an image, T words, N cells, C channels, H state width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capdist.models.attention import AdditiveAttention, Look, Memory
from capdist.models.deferred import StepLinear
from capdist.models.packing import Packing

Products = tuple[StepLinear, StepLinear]
"""Layers of the hidden state and of the context that each step applies."""


@dataclass(frozen=True)
class DecoderState:
    """What a search carries from word to word.

    Attributes:
        memory: What the attention looks at, (B, …) each, never repeated for the rows of an image.
        products: Layers that each step applies.
        hidden: (B, R, H).
        cell: (B, R, H).
    """

    memory: Memory
    products: Products
    hidden: Tensor
    cell: Tensor


class SoftAttentionDecoder(nn.Module):
    """LSTM over `word embedding ++ context`, Xu et al., Show, Attend and Tell (2015), section 3.1.2.

    Args:
        feature_size: C.
        vocab_size: V.
        embed_size: Width of a word vector.
        hidden_size: H.
        attention_size: Width of the space in which query and keys meet.
        dropout: On word vectors and on the state before the head.
        gate: Scale the context by a sigmoid of the state (section 4.2.1).
        tie_weights: Share one matrix between word vectors and head, Press & Wolf, Using the Output Embedding to
            Improve Language Models (2017).
        pad_id: Id whose word vector starts as zero, and stays so unless it is tied.
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
        self.dropout = nn.Dropout(dropout)
        self.attention = AdditiveAttention(feature_size, hidden_size, attention_size)
        self.gate = nn.Linear(hidden_size, feature_size) if gate else None
        self.initial_hidden = nn.Linear(feature_size, hidden_size)
        self.initial_cell = nn.Linear(feature_size, hidden_size)
        self.lstm = nn.LSTMCell(embed_size + feature_size, hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        with torch.no_grad():
            self.embedding.weight[pad_id].zero_()
        if tie_weights:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def sharpen(self, temperature: float) -> None:
        """Divide the logits by a temperature, once and for all."""
        self.head.weight.div_(temperature)
        self.head.bias.div_(temperature)
        if self.head.weight is self.embedding.weight:
            # The word vectors have shrunk or grown with the head: what reads them makes up for it.
            self.lstm.weight_ih[:, : self.embedding.embedding_dim].mul_(temperature)

    def init_state(self, features: Tensor) -> DecoderState:
        """Start one caption an image; features are (B, N, C)."""
        hidden, cell = self._first_state(features)
        return DecoderState(self.attention.memory(features), self._products(), hidden[:, None], cell[:, None])

    def reorder(self, state: DecoderState, parents: Tensor) -> DecoderState:
        """Let row r of each image go on from its row `parents[b, r]`; parents is (B, new R)."""
        index = parents[..., None].expand(-1, -1, state.hidden.shape[-1])
        return replace(state, hidden=state.hidden.gather(1, index), cell=state.cell.gather(1, index))

    def select(self, state: DecoderState, images: Tensor) -> DecoderState:
        """Keep some images (kept,) of a search."""
        features, keys = state.memory
        memory = features[images], keys[images]
        return replace(state, memory=memory, hidden=state.hidden[images], cell=state.cell[images])

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, DecoderState]:
        """Read one word for each row.

        Args:
            tokens: (B, R) ids of the words just said.
            state: With R rows.

        Returns:
            Logits (B, R, V) of the next word, attention (B, R, N), and the new state.
        """
        look = self.attention.of_rows(state.memory)
        attention, hidden, cell = self._advance(self._gates(tokens), state.hidden, state.cell, look, state.products)
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
        look = self.attention.of_captions(self.attention.memory(features), rows)
        image_of_row = rows // (len(rows) // len(features))
        hidden, cell = (values[image_of_row] for values in self._first_state(features))
        products = self._products()
        # A process left without captions takes the step all the same, with no rows.
        counts = packing.counts or [0]
        # What words give to the gates does not wait for the state: all words in one product.
        gates_of_words = self._gates(packing.pick(input_ids)).split(counts)
        said, looked = [], []
        for count, gates in zip(counts, gates_of_words, strict=True):
            weights, hidden, cell = self._advance(gates, hidden[:count], cell[:count], look, products)
            said.append(hidden)
            looked.append(weights)
        by_row = torch.zeros(len(rows), features.shape[1], device=features.device, dtype=looked[0].dtype)
        by_row = by_row.index_add(0, torch.cat([rows[:count] for count in counts]), torch.cat(looked))
        return self.dropout(torch.cat(said)), by_row

    def _first_state(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden and cell before the first word, (B, H) each."""
        mean = features.mean(dim=1)
        return torch.tanh(self.initial_hidden(mean)), torch.tanh(self.initial_cell(mean))

    def _gates(self, tokens: Tensor) -> Tensor:
        """Return what words, ids (…), give to the gates (…, 4H)."""
        of_words = self.lstm.weight_ih[:, : self.embedding.embedding_dim]
        return F.linear(self.dropout(self.embedding(tokens)), of_words, self.lstm.bias_ih)

    def _products(self) -> Products:
        layers = [self.attention.query] if self.gate is None else [self.attention.query, self.gate]
        of_hidden = StepLinear(
            torch.cat([*(layer.weight for layer in layers), self.lstm.weight_hh]),
            torch.cat([*(layer.bias for layer in layers), self.lstm.bias_hh]),
        )
        return of_hidden, StepLinear(self.lstm.weight_ih[:, self.embedding.embedding_dim :])

    def _advance(
        self, gates: Tensor, hidden: Tensor, cell: Tensor, look: Look, products: Products
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights (…, N) of what the rows look at, and their next hidden and cell (…, H).

        Args:
            gates: (…, 4H) from the words just said, in `nn.LSTMCell`'s order.
            hidden: (…, H).
            cell: (…, H).
            look: Of the rows.
            products: From `_products`.
        """
        through_hidden, through_context = products
        gate_size, query_size = 4 * self.lstm.hidden_size, self.attention.query.out_features
        of_hidden = through_hidden(hidden)
        query, context_gate, hidden_gates = of_hidden.split(
            [query_size, of_hidden.shape[-1] - query_size - gate_size, gate_size], dim=-1
        )
        context, weights = look(query)
        if self.gate is not None:
            context = context * torch.sigmoid(context_gate)
        gates = gates + hidden_gates + through_context(context)
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=-1)
        cell = torch.sigmoid(forget_gate) * cell + torch.sigmoid(input_gate) * torch.tanh(candidate)
        return weights, torch.sigmoid(output_gate) * torch.tanh(cell), cell
