"""The training loop and what it stands on; the only package that imports accelerate."""
