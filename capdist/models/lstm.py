"""The LSTM decoder with soft attention.

Shapes: B images, R captions or beams of an image, T words, N cells, C channels, H state width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capdist.models.attention import ATTENTIONS, Look, Memory
from capdist.models.decoder import Decoder, Reading, rows_of
from capdist.models.fast.packing import Packing
from capdist.models.fast.step_products import StepLinear
from capdist.recipe.decoders import SoftAttentionSection

Products = tuple[StepLinear, StepLinear]
"""The layers that every step applies: one to the hidden state, one to the context."""


@dataclass(frozen=True)
class LSTMState:
    """What a search carries from word to word.

    Attributes:
        memory: What the attention looks at, once an image.
        products: The layers that every step applies.
        hidden: (B, R, H).
        cell: (B, R, H).
    """

    memory: Memory
    products: Products
    hidden: Tensor
    cell: Tensor


class SoftAttentionDecoder(Decoder[LSTMState]):
    """LSTM over `word vector ++ context`, Xu et al., Show, Attend and Tell (2015), section 3.1.2.

    Args:
        section: Gives sizes, dropout and options. `gate` scales the context by a sigmoid of the state (section 4.2.1).
            `tie_weights` shares one matrix between word vectors and head (Press & Wolf, Using the Output Embedding to
            Improve Language Models, 2017).
        feature_size: C, the number of channels of a cell.
        vocab_size: V, the number of words including special tokens.
        pad_id: Id whose word vector starts as zero, and stays zero unless it is tied.
    """

    def __init__(self, section: SoftAttentionSection, *, feature_size: int, vocab_size: int, pad_id: int) -> None:
        super().__init__()
        embed_size, hidden_size = section.embed_size, section.hidden_size
        self.embedding = nn.Embedding(vocab_size, embed_size, padding_idx=pad_id)
        self.dropout = nn.Dropout(section.dropout)
        self.attention = ATTENTIONS[section.attention](feature_size, hidden_size, section.attention_size)
        self.gate = nn.Linear(hidden_size, feature_size) if section.gate else None
        self.initial_hidden = nn.Linear(feature_size, hidden_size)
        self.initial_cell = nn.Linear(feature_size, hidden_size)
        self.lstm = nn.LSTMCell(embed_size + feature_size, hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        with torch.no_grad():
            self.embedding.weight[pad_id].zero_()
        if section.tie_weights:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def sharpen(self, temperature: float) -> None:
        """See `Decoder.sharpen`."""
        super().sharpen(temperature)
        if self.head.weight is self.embedding.weight:
            # The tied word vectors are scaled with the head, so the layer that reads them compensates.
            self.lstm.weight_ih[:, : self.embedding.embedding_dim].mul_(temperature)

    def init_state(self, features: Tensor) -> LSTMState:
        """See `Decoder.init_state`."""
        hidden, cell = self._first_state(features)
        return LSTMState(self.attention.memory(features), self._products(), hidden[:, None], cell[:, None])

    def reorder(self, state: LSTMState, parents: Tensor) -> LSTMState:
        """See `Decoder.reorder`."""
        return replace(state, hidden=rows_of(state.hidden, parents), cell=rows_of(state.cell, parents))

    def select(self, state: LSTMState, images: Tensor) -> LSTMState:
        """See `Decoder.select`."""
        memory = self.attention.select(state.memory, images)
        return replace(state, memory=memory, hidden=state.hidden[images], cell=state.cell[images])

    def step(self, tokens: Tensor, state: LSTMState) -> tuple[Tensor, Tensor, LSTMState]:
        """See `Decoder.step`."""
        look = self.attention.for_search(state.memory)
        attention, hidden, cell = self._advance(self._gates(tokens), state.hidden, state.cell, look, state.products)
        return self.head(self.dropout(hidden)), attention, replace(state, hidden=hidden, cell=cell)

    def read(self, features: Tensor, input_ids: Tensor, lengths: Sequence[int]) -> Reading:
        """Read whole captions, longest first, so that a caption that has ended costs nothing; see `Decoder.read`."""
        packing = Packing.of(torch.tensor(lengths), input_ids.shape[1], input_ids.device)
        rows = packing.rows
        look = self.attention.for_training(self.attention.memory(features), rows)
        image_of_row = rows // (len(rows) // len(features))
        hidden, cell = (values[image_of_row] for values in self._first_state(features))
        products = self._products()
        # A process without captions also takes the step, with no rows.
        counts = packing.counts or [0]
        # The share of the words in the gates does not depend on the state, so one product serves all words.
        gates_of_words = self._gates(packing.pick(input_ids)).split(counts)
        states, attention = [], []
        for count, gates in zip(counts, gates_of_words, strict=True):
            weights, hidden, cell = self._advance(gates, hidden[:count], cell[:count], look, products)
            states.append(hidden)
            attention.append(weights)
        # The head sees all words of the batch in one product, and no padding.
        logits = self.head(self.dropout(torch.cat(states)))
        by_row = torch.zeros(len(rows), features.shape[1], device=features.device, dtype=attention[0].dtype)
        by_row = by_row.index_add(0, torch.cat([rows[:count] for count in counts]), torch.cat(attention))
        return Reading(logits, packing.words, by_row)

    def _first_state(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden and cell before the first word, (B, H) each."""
        mean = features.mean(dim=1)
        return torch.tanh(self.initial_hidden(mean)), torch.tanh(self.initial_cell(mean))

    def _gates(self, tokens: Tensor) -> Tensor:
        """Return the share of words (…), given as ids, in the gates (…, 4H)."""
        of_words = self.lstm.weight_ih[:, : self.embedding.embedding_dim]
        return F.linear(self.dropout(self.embedding(tokens)), of_words, self.lstm.bias_ih)

    def _products(self) -> Products:
        """Return all layers of the hidden state as one product a step, and the layer of the context."""
        layers = [self.attention.query] if self.gate is None else [self.attention.query, self.gate]
        of_hidden = StepLinear(
            torch.cat([*(layer.weight for layer in layers), self.lstm.weight_hh]),
            torch.cat([*(layer.bias for layer in layers), self.lstm.bias_hh]),
        )
        return of_hidden, StepLinear(self.lstm.weight_ih[:, self.embedding.embedding_dim :])

    def _advance(
        self, gates: Tensor, hidden: Tensor, cell: Tensor, look: Look, products: Products
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step of the LSTM.

        Args:
            gates: (…, 4H) from the words read now, in the order of `nn.LSTMCell`.
            hidden: (…, H).
            cell: (…, H).
            look: Turns the queries of these rows into contexts and weights.
            products: What `_products` returned.

        Returns:
            Attention (…, N), and the next hidden and cell (…, H).
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
