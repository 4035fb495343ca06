"""Captions for photos: the `Captioner`, pictures of what it looked at, and the report of a run."""
