"""Tensors only: encoder, attention, decoder and the whole network."""
