"""Tensors only: encoder, attention, decoders and the whole network."""

from capdist.models.decoder import Decoder
from capdist.models.lstm import SoftAttentionDecoder
from capdist.models.transformer import TransformerDecoder

DECODERS: dict[str, type[Decoder]] = {"soft_attention": SoftAttentionDecoder, "transformer": TransformerDecoder}
"""The class for each `decoder.name`."""
