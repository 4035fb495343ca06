"""The whole network: encoder, projection and decoder, from photos to logits.

Shapes: B images, R captions an image, T words, W words that are read, N cells, C channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capdist.models import DECODERS
from capdist.models.decoder import Decoder
from capdist.models.encoder import Encoder, build_backbone
from capdist.recipe.decoders import DecoderSection
from capdist.recipe.sections import EncoderSection

Rewrite = Callable[[Decoder[Any], Tensor, Tensor, Sequence[int]], Tensor]
"""Takes decoder, features (B, N, C), input ids (B·R, T) and their lengths; returns the ids to read instead."""


class Output(NamedTuple):
    """What the network computes from a batch; an objective turns it into a loss.

    Attributes:
        logits: (W, V) of the next word, at least float32, one row for each word that was read.
        words: (W,) where in the captions (B·R, T), flattened, each of these words lies.
        attention: (B·R, N) attention that each cell got, summed over the words of a caption; None if the decoder does
            not report it.
        word_presence: (B, V) logits of whether the captions of an image contain a word, or None without a word head.
        cell_copies: How many cells of the published grid each of the N cells counts for, see `Encoder.repeats`.
    """

    logits: Tensor
    words: Tensor
    attention: Tensor | None
    word_presence: Tensor | None
    cell_copies: int


class CaptionModel(nn.Module):
    """The whole network, from photos to words.

    `capdist.decoding` searches with `init_state`, `step`, `reorder` and `select`.

    Args:
        encoder: Turns photos into features.
        decoder: Turns features into words; its feature size is that of the projection if there is one.
        projection: Number of channels that a 1x1 convolution makes of the features; None = no convolution.

    Attributes:
        word_head: A layer that only training uses, see `add_word_head`.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder[Any], projection: int | None) -> None:
        super().__init__()
        self.encoder = encoder
        # On cells a 1x1 convolution is a linear layer.
        self.projection = nn.Linear(encoder.channels, projection) if projection else nn.Identity()
        self.decoder = decoder
        self.word_head: nn.Linear | None = None
        self._word_head_dropout = 0.0

    def add_word_head(self, dropout: float) -> None:
        """Add a layer that predicts, from the mean of the features, which words the captions of an image have.

        This auxiliary task makes features hold what captions mention. It is learned jointly, while Wu et al. learn such
        attributes beforehand (What Value Do Explicit High Level Concepts Have in Vision to Language Problems?, 2016).

        Args:
            dropout: Share of the mean feature that is dropped in training.
        """
        width = self.encoder.channels if isinstance(self.projection, nn.Identity) else self.projection.out_features
        self.word_head = nn.Linear(width, self.decoder.head.out_features)
        self._word_head_dropout = dropout
        # Captions of an image have few words of the vocabulary: begin with one in a hundred.
        nn.init.constant_(self.word_head.bias, math.log(0.01 / 0.99))

    @contextmanager
    def without_word_head(self) -> Iterator[None]:
        """Remove the word head within the context, because captioning does not need it."""
        head, self.word_head = self.word_head, None
        try:
            yield
        finally:
            self.word_head = head

    def forward(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        *,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        rewrite: Rewrite | None = None,
    ) -> Output:
        """Read an image-major batch (teacher forcing).

        Args:
            input_ids: (B·R, T), `<bos> a dog`; the captions of an image are neighbours.
            lengths: Words to read of each row, on the host.
            pixel_values: (B, 3, height, width), normalised; or
            features: (B, N, C) that `encode` made earlier.
            rewrite: Replaces the words that are read, given the features; scheduled sampling does.
        """
        if features is None:
            assert pixel_values is not None
            features = self.encode(pixel_values)
        projected = self.projection(features)
        if rewrite is not None:
            input_ids = rewrite(self.decoder, projected, input_ids, lengths)
        reading = self.decoder.read(projected, input_ids, lengths)
        return Output(
            _at_least_float32(reading.logits),
            reading.words,
            reading.attention,
            self._word_presence(projected),
            self.encoder.repeats(features.shape[1]),
        )

    def _word_presence(self, projected: Tensor) -> Tensor | None:
        if self.word_head is None:
            return None
        mean = F.dropout(projected.mean(dim=1), self._word_head_dropout, self.training)
        return _at_least_float32(self.word_head(mean))

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return the encoder's features (B, N, C) of normalised photos (B, 3, height, width)."""
        features: Tensor = self.encoder(pixel_values)
        return features

    def init_state(self, features: Tensor) -> Any:
        """Start one caption an image; features are (B, N, C) from `encode`."""
        return self.decoder.init_state(self.projection(features))

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Read one word a row; see `Decoder.step`."""
        return self.decoder.step(tokens, state)

    def reorder(self, state: Any, parents: Tensor) -> Any:
        """Continue from other rows; see `Decoder.reorder`."""
        return self.decoder.reorder(state, parents)

    def select(self, state: Any, images: Tensor) -> Any:
        """Keep some images; see `Decoder.select`."""
        return self.decoder.select(state, images)


def _at_least_float32(logits: Tensor) -> Tensor:
    # A loss sums over words, which needs float32 even if the step has a lower precision.
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def build_model(
    encoder: EncoderSection, decoder: DecoderSection, *, vocab_size: int, pad_id: int, load_weights: bool = True
) -> CaptionModel:
    """Make the network of a recipe.

    Args:
        encoder: Chooses the backbone, its weights and the grid.
        decoder: Chooses the decoder and its sizes.
        vocab_size: V, the number of words including special tokens.
        pad_id: Id of `<pad>`.
        load_weights: Whether to load the encoder's weights; False if a saved model will bring them.

    Raises:
        UsageError, CheckpointError, StorageError: as `build_backbone`.
    """
    backbone = build_backbone(encoder.name, encoder.last_block, encoder.weights if load_weights else "none")
    decoder_module = DECODERS[decoder.name](
        decoder, feature_size=encoder.projection or backbone.channels, vocab_size=vocab_size, pad_id=pad_id
    )
    encoder_module = Encoder(
        backbone,
        grid=encoder.grid,
        trainable_from=encoder.trainable_from,
        batch_norm=encoder.batch_norm,
        gradient_checkpointing=encoder.gradient_checkpointing,
    )
    model = CaptionModel(encoder_module, decoder_module, encoder.projection)
    return model.to(memory_format=torch.channels_last)
