"""What a search needs of a model: four functions over a state that the search never looks into.

Shapes: B images, R rows (captions under way) of an image, V vocabulary, N cells of the encoder grid.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

State = TypeVar("State")


class Decoder(Protocol[State]):
    """A captioner that writes one word at a time.

    Features and attention keys belong to the image: a state holds them once an image, for any number of rows. Only what
    differs between rows (the recurrent state) is per row, and `reorder` moves that.
    """

    def init_state(self, features: Tensor) -> State:
        """Return the state before the first word, one row an image.

        Args:
            features: Encoder grid, (B, N, channels).
        """
        ...

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Read one token a row.

        Args:
            tokens: (B, R) long: the word read last, `<bos>` at first.
            state: State that the last call returned for these rows.

        Returns:
            Logits of the next token (B, R, V), the attention they were made with (B, R, N), the new state.
        """
        ...

    def reorder(self, state: State, parents: Tensor) -> State:
        """Return a state whose row `r` of image `b` continues row `parents[b, r]` of that image.

        Args:
            state: State with any number of rows.
            parents: (B, new rows) long; rows may be repeated or left out, so this also turns 1 row into many.
        """
        ...

    def select(self, state: State, images: Tensor) -> State:
        """Return the state of some of its images.

        Args:
            state: State with any number of images and rows.
            images: (images kept,) long.
        """
        ...
