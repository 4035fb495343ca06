"""Tiny networks and their losses, for tests of everything that needs one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from capdist.models import DECODERS
from capdist.models.caption_model import CaptionModel, Output
from capdist.models.decoder import Decoder
from capdist.models.encoder import Backbone, Encoder
from capdist.recipe.decoders import DECODER_SECTIONS
from capdist.text.vocabulary import IGNORED_LABEL
from capdist.training.objectives import cross_entropy


def tiny_decoder(
    name: str = "soft_attention", *, feature_size: int = 6, vocab_size: int = 13, **keys: Any
) -> Decoder[Any]:
    """Return a decoder with random weights, whose sizes are 8 and whose dropout is 0 unless `keys` say otherwise."""
    kind = DECODER_SECTIONS[name]
    sizes = {key: 8 for key in kind.model_fields if key.endswith("_size")}
    section = kind.model_validate({"dropout": 0.0} | sizes | keys)
    return DECODERS[name](section, feature_size=feature_size, vocab_size=vocab_size, pad_id=0)


def tiny_encoder(channels: int = 6, layers: OrderedDict[str, nn.Module] | None = None, **options: Any) -> Encoder:
    """Return an encoder of a few layers, by default one convolution that makes a cell of 4 x 4 pixels."""
    network = nn.Sequential(layers or OrderedDict(layer1=nn.Conv2d(3, channels, 4, stride=4)))
    return Encoder(Backbone(network, channels, (0.5,) * 3, (0.25,) * 3), **options)


def tiny_model(
    decoder: str = "soft_attention",
    *,
    channels: int = 6,
    vocab_size: int = 13,
    projection: int | None = None,
    layers: OrderedDict[str, nn.Module] | None = None,
    encoder: dict[str, Any] | None = None,
    seed: int | None = 0,
    **keys: Any,
) -> CaptionModel:
    """Return a whole network with random weights.

    Args:
        decoder: A name in `DECODERS`.
        channels: Channels of the encoder.
        vocab_size: Words, the special ones included.
        projection: Width of the projection, or None.
        layers: Of the encoder; None = one convolution.
        encoder: Options of `Encoder`.
        seed: Seed of the weights; None = torch's generator as it is.
        keys: Of the decoder's section.
    """
    if seed is not None:
        torch.manual_seed(seed)
    made_encoder = tiny_encoder(channels, layers, **(encoder or {}))
    made_decoder = tiny_decoder(decoder, feature_size=projection or channels, vocab_size=vocab_size, **keys)
    return CaptionModel(made_encoder, made_decoder, projection)


def read(model: CaptionModel, input_ids: Tensor, labels: Tensor, **inputs: Any) -> Output:
    """Run the network on captions whose lengths follow from their labels."""
    output: Output = model(input_ids, (labels != IGNORED_LABEL).sum(dim=1).tolist(), **inputs)
    return output


def loss_of(
    model: CaptionModel, input_ids: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, **inputs: Any
) -> Tensor:
    """Return the cross-entropy of captions, summed over words."""
    return cross_entropy(read(model, input_ids, labels, **inputs), labels, None, label_smoothing)
