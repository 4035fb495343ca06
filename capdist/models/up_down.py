"""The decoder of two LSTMs, one that looks and one that speaks.

Shapes: B images, N cells, C channels, H state width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capdist.models.attention import AdditiveAttention, Look
from capdist.models.decoder import Decoder, Products, Tensors, next_hidden_and_cell
from capdist.models.deferred import StepLinear


class UpDownDecoder(Decoder):
    """Bottom-Up and Top-Down Attention, Anderson et al. (2018), section 3.2.

    The attention LSTM reads `hidden of the language LSTM ++ mean feature ++ word embedding`, its new hidden state asks
    the additive attention; the language LSTM reads `context ++ hidden of the attention LSTM`, and the head its hidden
    state. Both start from zeros.

    Args:
        feature_size: C.
        vocab_size: V.
        embed_size: Width of a word vector.
        hidden_size: H, of both.
        attention_size: Width of queries and keys.
        dropout: On word vectors and on the state before the head.
        tie_weights: Share one matrix between word vectors and head.
        pad_id: Id whose word vector stays zero.
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
        tie_weights: bool,
        pad_id: int,
        feature_dropout: float = 0.0,
        state_dropout: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, embed_size, pad_id, dropout, feature_dropout, state_dropout)
        self.attention = AdditiveAttention(feature_size, hidden_size, attention_size)
        self.attention_lstm = nn.LSTMCell(hidden_size + feature_size + embed_size, hidden_size)
        self.language_lstm = nn.LSTMCell(feature_size + hidden_size, hidden_size)
        self._add_head(hidden_size, tie_weights)

    def _first_state(self, features: Tensor) -> Tensors:
        return (features.new_zeros(len(features), self.language_lstm.hidden_size),) * 4

    def _attention_weights(self) -> Tensors:
        """Return what the attention LSTM multiplies language state, mean feature and word with."""
        hidden_size, embed_size = self.attention_lstm.hidden_size, self.embedding.embedding_dim
        return self.attention_lstm.weight_ih.tensor_split([hidden_size, -embed_size], dim=1)

    def _image_gates(self, features: Tensor) -> Tensors:
        return (F.linear(features.mean(dim=1), self._attention_weights()[1]),)

    def _word_layer(self) -> tuple[Tensor, Tensor]:
        return self._attention_weights()[2], self.attention_lstm.bias_ih

    def _products(self) -> Products:
        looking, speaking, query = self.attention_lstm, self.language_lstm, self.attention.query
        of_context, of_attending = speaking.weight_ih.tensor_split([-looking.hidden_size], dim=1)
        return (
            StepLinear(torch.cat([self._attention_weights()[0], looking.weight_hh], dim=1), looking.bias_hh),
            StepLinear(torch.cat([query.weight, of_attending]), torch.cat([query.bias, speaking.bias_ih])),
            StepLinear(torch.cat([of_context, speaking.weight_hh], dim=1), speaking.bias_hh),
        )

    def _advance(self, gates: Tensor, recurrent: Tensors, look: Look, products: Products) -> tuple[Tensor, Tensors]:
        language, attending, language_cell, attending_cell = recurrent
        through_states, through_attending, through_context = products
        gates = gates + through_states(torch.cat([language, attending], dim=-1))
        attending, attending_cell = next_hidden_and_cell(gates, attending_cell)
        query_size = self.attention.query.out_features
        query, gates = through_attending(attending).tensor_split([query_size], dim=-1)
        context, weights = look(query)
        gates = gates + through_context(torch.cat([context, language], dim=-1))
        language, language_cell = next_hidden_and_cell(gates, language_cell)
        return weights, (language, attending, language_cell, attending_cell)
