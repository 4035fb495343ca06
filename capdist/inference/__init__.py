"""Captions for photos with a trained model; needs nothing that trains."""
