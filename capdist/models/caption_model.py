"""The whole network: encoder, projection, decoder, and the loss of a batch.

Shapes: B images, R captions an image, T words, N cells, C channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capdist.config import DecoderSection, EncoderSection
from capdist.models.decoder import DecoderState, SoftAttentionDecoder
from capdist.models.encoder import Encoder, build_backbone
from capdist.models.packing import Packing
from capdist.text.vocabulary import IGNORED_LABEL


class CaptionLoss(NamedTuple):
    """Sums over the words of a batch; whoever knows the words of the whole global step divides.

    Attributes:
        cross_entropy: Negative log-likelihood of the labels, smoothed if asked.
        doubly_stochastic: Sum over captions and cells of (1 - attention a cell got)², Xu et al., equation 14.
        word_presence: Sum over images and words of the negative log-likelihood of whether the captions of the image
            have the word; 0 without a word head.
    """

    cross_entropy: Tensor
    doubly_stochastic: Tensor
    word_presence: Tensor


class CaptionModel(nn.Module):
    """Photo in, caption out.

    It is also what `capdist.decoding` searches with: `init_state`, `step`, `reorder`, `select`.

    Args:
        encoder: Photos to features.
        decoder: Features to words; its feature size is that of the projection if there is one.
        projection: Width of a 1x1 convolution over the features, or None.

    Attributes:
        word_head: Of training only, see `add_word_head`.
    """

    def __init__(self, encoder: Encoder, decoder: SoftAttentionDecoder, projection: int | None) -> None:
        super().__init__()
        self.encoder = encoder
        # On cells a 1x1 convolution is a linear layer.
        self.projection = nn.Linear(encoder.channels, projection) if projection else nn.Identity()
        self.decoder = decoder
        self.word_head: nn.Linear | None = None

    def add_word_head(self) -> None:
        """Add a layer that tells from the mean of the features which words the captions of an image have.

        Learning that, too, features come to hold what captions speak of: the attributes of Wu et al., What Value Do
        Explicit High Level Concepts Have in Vision to Language Problems? (2016), learned along instead of before.
        """
        width = self.encoder.channels if isinstance(self.projection, nn.Identity) else self.projection.out_features
        self.word_head = nn.Linear(width, self.decoder.embedding.num_embeddings)
        # Of the words of a vocabulary few are said of an image: begin with one in a hundred.
        nn.init.constant_(self.word_head.bias, math.log(0.01 / 0.99))

    @contextmanager
    def without_word_head(self) -> Iterator[None]:
        """Leave out for a while what is not needed for captions."""
        head, self.word_head = self.word_head, None
        try:
            yield
        finally:
            self.word_head = head

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        own_words: float = 0.0,
    ) -> CaptionLoss:
        """Return the loss of an image-major batch.

        Args:
            input_ids: (B·R, T), `<bos> a dog`, the captions of an image side by side.
            labels: (B·R, T), `a dog <eos>`, then `IGNORED_LABEL`.
            pixel_values: (B, 3, height, width), normalised; or
            features: (B, N, C) that `encode` made earlier.
            lengths: Labels of each row, if they are known already: finding out makes the host wait for the device.
            weights: (B·R,) by which the cross-entropy of each row is multiplied; None = 1.
            label_smoothing: Share of probability spread over all words.
            own_words: Share of the words read that are what the model itself would have said there.
        """
        if features is None:
            assert pixel_values is not None
            features = self.encode(pixel_values)
        if lengths is None:
            lengths = (labels != IGNORED_LABEL).sum(dim=1).tolist()
        packing = Packing.of(torch.tensor(lengths), labels.shape[1], labels.device)
        projected = self.projection(features)
        if own_words:
            input_ids = self._mix_in(projected, input_ids, packing, own_words)
            # In older versions of torch a cast that autocast keeps of this pass has no gradient in the next one
            # (pytorch issue 112583).
            torch.clear_autocast_cache()
        hidden, looked = self.decoder(projected, input_ids, packing)
        # The head sees all words of the batch in one product, and no padding.
        logits = self.decoder.head(hidden)
        # The sum over words needs float32 even where the step is computed in less.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        of_words = F.cross_entropy(logits, packing.pick(labels), label_smoothing=label_smoothing, reduction="none")
        if weights is not None:
            of_words = of_words * packing.pick(weights[:, None].expand_as(labels))
        repeats = self.encoder.repeats(features.shape[1])
        penalty = repeats * ((1 - looked / repeats) ** 2).sum(dim=-1)
        return CaptionLoss(
            of_words.sum(), (penalty * (labels[:, 0] != IGNORED_LABEL)).sum(), self._word_presence(projected, labels)
        )

    def _word_presence(self, projected: Tensor, labels: Tensor) -> Tensor:
        if self.word_head is None:
            return labels.new_zeros((), dtype=torch.float32)
        logits = self.word_head(self.decoder.dropout(projected.mean(dim=1)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        words = labels.view(len(projected), -1)
        has_captions = (words != IGNORED_LABEL).any(dim=1)
        # What is no word goes to a column of its own, which is dropped.
        said = logits.new_zeros(len(words), logits.shape[1] + 1)
        said.scatter_(1, words.where(words != IGNORED_LABEL, logits.shape[1]), 1.0)
        of_images = F.binary_cross_entropy_with_logits(logits, said[:, :-1], reduction="none").sum(dim=1)
        return (of_images * has_captions).sum()

    @torch.no_grad()
    def _mix_in(self, projected: Tensor, input_ids: Tensor, packing: Packing, share: float) -> Tensor:
        """Return captions in which words of people have been replaced by samples of the model.

        Scheduled sampling (Bengio et al. 2015) in two passes (Duckworth et al. 2019): what is drawn follows the words
        of people, so that all words are drawn at once.
        """
        hidden, _ = self.decoder(projected, input_ids, packing)
        chances = self.decoder.head(hidden).float().softmax(dim=-1)
        # A draw as `multinomial` does it, which would end the program where the weights are not finite any more.
        said = (chances / torch.empty_like(chances).exponential_()).argmax(dim=-1)
        read = packing.words + 1  # what is said at a position is read at the next, if that is of the same caption
        chosen = (torch.rand(len(read), device=read.device) < share) & (read % input_ids.shape[1] != 0)
        mixed = F.pad(input_ids.flatten(), (0, 1))
        mixed[read] = said.where(chosen, mixed[read])
        return mixed[:-1].view_as(input_ids)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return the encoder's features (B, N, C) of normalised photos (B, 3, height, width)."""
        features: Tensor = self.encoder(pixel_values)
        return features

    def init_state(self, features: Tensor) -> DecoderState:
        """Start one caption an image; features are (B, N, C) from `encode`."""
        return self.decoder.init_state(self.projection(features))

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, DecoderState]:
        """Read one word a row; see `SoftAttentionDecoder.step`."""
        return self.decoder.step(tokens, state)

    def reorder(self, state: DecoderState, parents: Tensor) -> DecoderState:
        """Continue from other rows; see `SoftAttentionDecoder.reorder`."""
        return self.decoder.reorder(state, parents)

    def select(self, state: DecoderState, images: Tensor) -> DecoderState:
        """Keep some images; see `SoftAttentionDecoder.select`."""
        return self.decoder.select(state, images)


def build_model(
    encoder: EncoderSection, decoder: DecoderSection, *, vocab_size: int, pad_id: int, load_weights: bool = True
) -> CaptionModel:
    """Make the network of a recipe.

    Args:
        encoder: The recipe's section.
        decoder: The recipe's section.
        vocab_size: V.
        pad_id: Id of `<pad>`.
        load_weights: False leaves the encoder's weights to be loaded with the rest of a saved model.

    Raises:
        UsageError, CheckpointError, StorageError: as `build_backbone`.
    """
    backbone = build_backbone(encoder.name, encoder.stage, encoder.weights if load_weights else "none")
    decoder_module = SoftAttentionDecoder(
        feature_size=encoder.projection or backbone.channels,
        vocab_size=vocab_size,
        embed_size=decoder.embed_size,
        hidden_size=decoder.hidden_size,
        attention_size=decoder.attention_size,
        dropout=decoder.dropout,
        gate=decoder.gate,
        tie_weights=decoder.tie_weights,
        pad_id=pad_id,
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
