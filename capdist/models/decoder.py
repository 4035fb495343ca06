"""What all decoders share, and the LSTM decoder with soft attention.

Shapes: B images, R captions or beams of an image, T words, N cells, C channels, H state width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capdist.models.attention import AdditiveAttention, Look, Memory
from capdist.models.deferred import StepLinear
from capdist.models.multi_head import MultiHeadAttention
from capdist.models.packing import Packing

Tensors = tuple[Tensor, ...]
Products = tuple[StepLinear, ...]


@dataclass(frozen=True)
class DecoderState:
    """What a search carries from word to word.

    Attributes:
        memory: What the attention looks at, (B, …) each, never repeated for the rows of an image.
        image_gates: Shares of the image in the gates that its words go to, (B, 4H) each, likewise.
        products: Layers that each step applies.
        recurrent: Hidden states, the one that the head reads first, and then as many cells, (B, R, H) each.
        masks: Of hidden states by state dropout, (B, R, H) each; none where there is no dropout.
    """

    memory: Memory
    image_gates: Tensors
    products: Products
    recurrent: Tensors
    masks: Tensors


class Decoder(nn.Module, ABC):
    """Words in and out, whole captions and single steps; how its LSTMs get on is up to the variant.

    A variant makes its own layers, and then the head by `_add_head`.

    Args:
        vocab_size: V.
        embed_size: Width of a word vector.
        pad_id: Id whose word vector stays zero.
        dropout: On word vectors and on the state before the head.
        feature_dropout: On the features of an image: one mask for all that is made of them.
        state_dropout: On the hidden states that a step begins with: one mask for all words of a caption, Gal &
            Ghahramani, A Theoretically Grounded Application of Dropout in Recurrent Neural Networks (2016). What the
            head reads, and what one LSTM tells another within a step, is not dropped.
    """

    attention: AdditiveAttention | MultiHeadAttention

    def __init__(
        self,
        vocab_size: int,
        embed_size: int,
        pad_id: int,
        dropout: float,
        feature_dropout: float,
        state_dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_size, padding_idx=pad_id)
        self.dropout = nn.Dropout(dropout)
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.state_dropout = state_dropout

    def _add_head(self, hidden_size: int, tie_weights: bool) -> None:
        """Make the head, the last layer; tied, it shares one matrix with the word vectors."""
        self.head = nn.Linear(hidden_size, self.embedding.num_embeddings)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        with torch.no_grad():
            self.embedding.weight[self.embedding.padding_idx].zero_()
        if tie_weights:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def sharpen(self, temperature: float) -> None:
        """Divide the logits by a temperature, once and for all."""
        self.head.weight.div_(temperature)
        self.head.bias.div_(temperature)
        if self.head.weight is self.embedding.weight:
            # The word vectors have shrunk with the head: what reads them makes up for it.
            self._word_layer()[0].mul_(temperature)

    @abstractmethod
    def _first_state(self, features: Tensor) -> Tensors:
        """Return `DecoderState.recurrent` before the first word, (B, H) each, for features (B, N, C)."""

    def _image_gates(self, features: Tensor) -> Tensors:
        """Return `DecoderState.image_gates` for features (B, N, C)."""
        return ()

    @abstractmethod
    def _products(self) -> Products:
        """Return the layers that `_advance` applies."""

    @abstractmethod
    def _word_layer(self) -> tuple[Tensor, Tensor]:
        """Return weight (4H, width of a word vector) and bias (4H,) through which words go to the gates of an LSTM.

        The weight is a view of the parameter, so that to change it in place is to change the model.
        """

    @abstractmethod
    def _advance(self, gates: Tensor, recurrent: Tensors, look: Look, products: Products) -> tuple[Tensor, Tensors]:
        """Return what the rows look at, and their next state.

        Args:
            gates: (…, 4H) from the words just said, and the shares of their images.
            recurrent: (…, H) each, hidden states after state dropout.
            look: Of the rows.
            products: From `_products`.
        """

    def init_state(self, features: Tensor) -> DecoderState:
        """Start one caption an image; features are (B, N, C)."""
        features = self.feature_dropout(features)
        recurrent = tuple(values[:, None] for values in self._first_state(features))
        memory, image_gates = self.attention.memory(features), self._image_gates(features)
        return DecoderState(memory, image_gates, self._products(), recurrent, self._masks(recurrent))

    def reorder(self, state: DecoderState, parents: Tensor) -> DecoderState:
        """Let row r of each image go on from its row `parents[b, r]`; parents is (B, new R)."""
        index = parents[..., None].expand(-1, -1, state.recurrent[0].shape[-1])
        recurrent, masks = (
            tuple(values.gather(1, index) for values in tensors) for tensors in (state.recurrent, state.masks)
        )
        return replace(state, recurrent=recurrent, masks=masks)

    def select(self, state: DecoderState, images: Tensor) -> DecoderState:
        """Keep some images (kept,) of a search."""
        names = ("memory", "image_gates", "recurrent", "masks")
        kept: dict[str, Any] = {name: tuple(values[images] for values in getattr(state, name)) for name in names}
        return replace(state, **kept)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, DecoderState]:
        """Read one word for each row.

        Args:
            tokens: (B, R) ids of the words just said.
            state: With R rows.

        Returns:
            Logits (B, R, V) of the next word, attention (B, R, N), and the new state.
        """
        look = self.attention.of_rows(state.memory)
        gates = self._gates(tokens, tuple(gates[:, None] for gates in state.image_gates))
        attention, recurrent = self._advance(gates, _mask(state.recurrent, state.masks), look, state.products)
        return self.head(self.dropout(recurrent[0])), attention, replace(state, recurrent=recurrent)

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
        features, rows = self.feature_dropout(features), packing.rows
        look = self.attention.of_captions(self.attention.memory(features), rows)
        num_captions = len(rows) // len(features)
        recurrent = tuple(values[rows // num_captions] for values in self._first_state(features))
        masks, products = self._masks(recurrent), self._products()
        # A process left without captions takes the step all the same, with no rows.
        counts = packing.counts or [0]
        row_of_word = torch.cat([rows[:count] for count in counts])
        image_gates = self._image_gates(features)
        shares = tuple(gates.index_select(0, row_of_word // num_captions) for gates in image_gates)
        # What words and images give to the gates does not wait for the state: all words in one product.
        gates_of_words = self._gates(packing.pick(input_ids), shares).split(counts)
        said, looked = [], []
        for count, gates in zip(counts, gates_of_words, strict=True):
            going = _mask(_first(recurrent, count), _first(masks, count))
            weights, recurrent = self._advance(gates, going, look, products)
            said.append(recurrent[0])
            looked.append(weights)
        by_row = torch.zeros(len(rows), features.shape[1], device=features.device, dtype=looked[0].dtype)
        by_row = by_row.index_add(0, row_of_word, torch.cat(looked))
        return self.dropout(torch.cat(said)), by_row

    def _gates(self, tokens: Tensor, shares: Tensors) -> Tensor:
        """Return gates (…, 4H) of ids (…), with the `shares` (…, 4H) of their images."""
        gates = F.linear(self.dropout(self.embedding(tokens)), *self._word_layer())
        for share in shares:
            gates = gates + share
        return gates

    def _masks(self, recurrent: Tensors) -> Tensors:
        if not self.training or not self.state_dropout:
            return ()
        hidden = recurrent[: len(recurrent) // 2]
        return tuple(F.dropout(torch.ones_like(values), self.state_dropout) for values in hidden)


def _mask(recurrent: Tensors, masks: Tensors) -> Tensors:
    hidden = (values * mask for values, mask in zip(recurrent, masks, strict=False))
    return (*hidden, *recurrent[len(masks) :])


def _first(tensors: Tensors, count: int) -> Tensors:
    return tuple(values[:count] for values in tensors)


def next_hidden_and_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden and cell (…, H) of an LSTM from gates (…, 4H) in `nn.LSTMCell`'s order and the cell before."""
    input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=-1)
    cell = torch.sigmoid(forget_gate) * cell + torch.sigmoid(input_gate) * torch.tanh(candidate)
    return torch.sigmoid(output_gate) * torch.tanh(cell), cell


class SoftAttentionDecoder(Decoder):
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
        num_heads: Heads of scaled dot-product attention, of which C and `attention_size` are multiples; None = the
            additive attention of the paper.
        feature_dropout: As `Decoder`.
        state_dropout: As `Decoder`.
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
        num_heads: int | None = None,
        feature_dropout: float = 0.0,
        state_dropout: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, embed_size, pad_id, dropout, feature_dropout, state_dropout)
        if num_heads is None:
            self.attention = AdditiveAttention(feature_size, hidden_size, attention_size)
        else:
            self.attention = MultiHeadAttention(feature_size, hidden_size, attention_size, num_heads)
        self.gate = nn.Linear(hidden_size, feature_size) if gate else None
        self.initial_hidden = nn.Linear(feature_size, hidden_size)
        self.initial_cell = nn.Linear(feature_size, hidden_size)
        self.lstm = nn.LSTMCell(embed_size + feature_size, hidden_size)
        self._add_head(hidden_size, tie_weights)

    def _first_state(self, features: Tensor) -> Tensors:
        mean = features.mean(dim=1)
        return torch.tanh(self.initial_hidden(mean)), torch.tanh(self.initial_cell(mean))

    def _products(self) -> Products:
        layers: list[Any] = [self.attention.query] if self.gate is None else [self.attention.query, self.gate]
        of_hidden = StepLinear(
            torch.cat([*(layer.weight for layer in layers), self.lstm.weight_hh]),
            torch.cat([*(layer.bias for layer in layers), self.lstm.bias_hh]),
        )
        return of_hidden, StepLinear(self.lstm.weight_ih[:, self.embedding.embedding_dim :])

    def _word_layer(self) -> tuple[Tensor, Tensor]:
        return self.lstm.weight_ih[:, : self.embedding.embedding_dim], self.lstm.bias_ih

    def _advance(self, gates: Tensor, recurrent: Tensors, look: Look, products: Products) -> tuple[Tensor, Tensors]:
        hidden, cell = recurrent
        through_hidden, through_context = products
        gate_size, query_size = 4 * self.lstm.hidden_size, self.attention.query.out_features
        of_hidden = through_hidden(hidden)
        query, context_gate, hidden_gates = of_hidden.split(
            [query_size, of_hidden.shape[-1] - query_size - gate_size, gate_size], dim=-1
        )
        context, weights = look(query)
        if self.gate is not None:
            context = context * torch.sigmoid(context_gate)
        return weights, next_hidden_and_cell(gates + hidden_gates + through_context(context), cell)
