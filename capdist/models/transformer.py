"""A small Transformer decoder: causal self-attention over words, cross-attention over the grid.

Shapes: B images, R captions or beams of an image, T words, N cells, C channels, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capdist.models.decoder import Decoder, Reading, rows_of
from capdist.recipe.decoders import TransformerSection

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


@dataclass(frozen=True)
class TransformerState:
    """What a search carries from word to word.

    Attributes:
        cells: Keys and values (B, H, N, D/H) of the grid for each layer, once an image.
        words: Keys and values (B, R, H, words so far, D/H) of the words for each layer.
        position: Words read so far.
    """

    cells: list[Pair]
    words: list[Pair]
    position: int


class TransformerDecoder(Decoder[TransformerState]):
    """The decoder of Vaswani et al., Attention Is All You Need (2017), with a norm before each part.

    With norms before each part it needs no warm-up (Xiong et al., On Layer Normalization in the Transformer
    Architecture, 2020).

    Args:
        section: Gives the width, the numbers of layers and heads, and the dropout.
        feature_size: C, the number of channels of a cell.
        vocab_size: V, the number of words including special tokens.
        pad_id: Id whose word vector starts as zero, and stays zero unless it is tied.
    """

    scale: Tensor

    def __init__(self, section: TransformerSection, *, feature_size: int, vocab_size: int, pad_id: int) -> None:
        super().__init__()
        width = section.hidden_size
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=pad_id)
        self.cells = nn.Sequential(nn.Linear(feature_size, width), nn.LayerNorm(width))
        layers = nn.ModuleList(_Layer(width, section.num_heads, section.dropout) for _ in range(section.num_layers))
        self.layers = cast("Sequence[_Layer]", layers)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(section.dropout)
        self.head = nn.Linear(width, vocab_size)
        # Word vectors are small, so that the tied head starts near a uniform distribution; they are scaled up when
        # read.
        self.register_buffer("scale", torch.tensor(math.sqrt(width)))
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        with torch.no_grad():
            self.embedding.weight[pad_id].zero_()
        if section.tie_weights:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def sharpen(self, temperature: float) -> None:
        """See `Decoder.sharpen`."""
        super().sharpen(temperature)
        if self.head.weight is self.embedding.weight:
            self.scale.mul_(temperature)  # compensates for the word vectors, which are scaled with the head

    def read(self, features: Tensor, input_ids: Tensor, lengths: Sequence[int]) -> Reading:
        """See `Decoder.read`."""
        rows, num_words = input_ids.shape
        cells = self.cells(features)
        hidden = self._embed(input_ids, 0)
        for layer in self.layers:
            hidden = layer.read_words(hidden)
            # The captions of an image are neighbours, so they share its keys and values without a copy.
            of_images, attention = layer.look(hidden.view(len(features), -1, hidden.shape[-1]), layer.of_cells(cells))
            hidden = layer.think(of_images.view_as(hidden))
        present = torch.arange(num_words) < torch.tensor(lengths)[:, None]  # on the host, without waiting
        words = present.flatten().nonzero()[:, 0].to(features.device, non_blocking=True)
        logits = self.head(self.dropout(self.norm(hidden.flatten(0, 1)[words])))
        mask = present.to(features.device, non_blocking=True).view(len(features), -1, 1)
        by_row = (attention * mask).view(rows, num_words, -1).sum(dim=1)
        return Reading(logits, words, by_row)

    def init_state(self, features: Tensor) -> TransformerState:
        """See `Decoder.init_state`."""
        cells = self.cells(features)
        of_cells = [layer.of_cells(cells) for layer in self.layers]
        nothing = of_cells[0][0][:, None, :, :0]
        return TransformerState(of_cells, [(nothing, nothing)] * len(of_cells), 0)

    def step(self, tokens: Tensor, state: TransformerState) -> tuple[Tensor, Tensor, TransformerState]:
        """See `Decoder.step`; the attention is that of the last layer."""
        hidden, words = self._embed(tokens[..., None], state.position)[:, :, 0], []
        for layer, of_cells, of_words in zip(self.layers, state.cells, state.words, strict=True):
            hidden, grown = layer.read_word(hidden, of_words)
            hidden, attention = layer.look(hidden, of_cells)
            hidden = layer.think(hidden)
            words.append(grown)
        logits = self.head(self.dropout(self.norm(hidden)))
        return logits, attention, replace(state, words=words, position=state.position + 1)

    def reorder(self, state: TransformerState, parents: Tensor) -> TransformerState:
        """See `Decoder.reorder`."""
        words = [(rows_of(keys, parents), rows_of(values, parents)) for keys, values in state.words]
        return replace(state, words=words)

    def select(self, state: TransformerState, images: Tensor) -> TransformerState:
        """See `Decoder.select`."""
        cells = [(keys[images], values[images]) for keys, values in state.cells]
        words = [(keys[images], values[images]) for keys, values in state.words]
        return replace(state, cells=cells, words=words)

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        """Return vectors (…, T, D) of words (…, T), the first at position `start`."""
        vectors = self.embedding(tokens) * self.scale
        positions = torch.arange(start, start + tokens.shape[-1], device=tokens.device)
        return self.dropout(vectors + _sinusoids(positions, vectors.shape[-1]).to(vectors.dtype))


class _Layer(nn.Module):
    """Self-attention over words, cross-attention over cells, and two layers in between, each added to its input."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.words, self.words_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.cells, self.cells_out = (nn.Linear(width, width * n) for n in (1, 2, 1))
        self.thought = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def read_words(self, hidden: Tensor) -> Tensor:
        """Attend from each word to the words before it and itself; hidden is (rows, T, D)."""
        query, key, value = (self._heads(part) for part in self.words(self.norms[0](hidden)).chunk(3, dim=-1))
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return hidden + self.dropout(self.words_out(context.transpose(1, 2).flatten(2)))

    def read_word(self, hidden: Tensor, before: Pair) -> tuple[Tensor, Pair]:
        """Do the same for the next word of each row, hidden (B, R, D); also return keys and values with that word."""
        query, key, value = (
            self._heads(part[:, :, None].flatten(0, 1)).unflatten(0, hidden.shape[:2])
            for part in self.words(self.norms[0](hidden)).chunk(3, dim=-1)
        )
        keys, values = (torch.cat(pair, dim=3) for pair in zip(before, (key, value), strict=True))
        context = F.scaled_dot_product_attention(query, keys, values)
        return hidden + self.dropout(self.words_out(context.squeeze(3).flatten(2))), (keys, values)

    def of_cells(self, cells: Tensor) -> Pair:
        """Return keys and values (B, H, N, D/H) of cells (B, N, D)."""
        key, value = (self._heads(part) for part in self.cells(cells).chunk(2, dim=-1))
        return key, value

    def look(self, hidden: Tensor, of_cells: Pair) -> tuple[Tensor, Tensor]:
        """Attend from words (B, words, D) to cells; also return the weights (B, words, N), the mean over heads."""
        keys, values = of_cells
        # Not `scaled_dot_product_attention`, which does not return its weights.
        query = self._heads(self.query(self.norms[1](hidden)))
        weights = (query @ keys.mT * keys.shape[-1] ** -0.5).softmax(dim=-1)
        context = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)
        return hidden + self.dropout(self.cells_out(context)), weights.mean(dim=1)

    def think(self, hidden: Tensor) -> Tensor:
        """Transform each word without looking at others (…, D)."""
        added: Tensor = self.dropout(self.thought(self.norms[2](hidden)))
        return hidden + added

    def _heads(self, vectors: Tensor) -> Tensor:
        """Return (rows, H, T, D/H) of vectors (rows, T, D)."""
        return vectors.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _sinusoids(positions: Tensor, width: int) -> Tensor:
    """Return the position vectors (T, width) of Vaswani et al., section 3.5."""
    rates = torch.exp(torch.arange(0, width, 2, device=positions.device) * (-math.log(10_000.0) / width))
    angles = positions[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
