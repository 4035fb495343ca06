"""Faster forms of parts of the network. Nothing here changes a result."""
