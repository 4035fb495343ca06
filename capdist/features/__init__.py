"""Encode each photo once: the store of features, the encoder pass that fills it, and the source that reads it."""
