"""Tensors only: encoder, attention, decoders and the whole network."""

from capdist.models.decoder import Decoder
from capdist.models.lstm import SoftAttentionDecoder

DECODERS: dict[str, type[Decoder]] = {"soft_attention": SoftAttentionDecoder}
"""The class for each `decoder.name`."""
