"""The contract of a decoder: what training and search need from the network that turns features into words.

A new decoder is one file with a subclass of `Decoder`, a section of recipe keys, and a line in
`capdist.models.DECODERS`.

Shapes: B images, R captions or beams of an image, T words, N cells, C channels, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

State = TypeVar("State")


class Reading(NamedTuple):
    """What a decoder computes from whole captions.

    Attributes:
        logits: (W, V) of the next word, one row for each of the W words that were read, in any order.
        words: (W,) where in the captions (B·R, T), flattened, each of these words lies.
        attention: (B·R, N) attention that each cell got, summed over the words of a caption; None if the decoder does
            not report it.
    """

    logits: Tensor
    words: Tensor
    attention: Tensor | None


class Decoder(nn.Module, ABC, Generic[State]):
    """A network that turns features into words.

    Training calls `read` with whole captions. Search calls `init_state`, then `step` for each word, and between words
    `reorder` and `select`; it never looks into a state. Both must give the same logits for the same words.

    A subclass is built with its section of the recipe, and with keywords for C, V and the id of `<pad>`:
    `(section, *, feature_size: int, vocab_size: int, pad_id: int)`.

    Attributes:
        head: Turns the decoder's last layer into logits (V,).
    """

    head: nn.Linear

    @abstractmethod
    def read(self, features: Tensor, input_ids: Tensor, lengths: Sequence[int]) -> Reading:
        """Read whole captions (teacher forcing).

        Args:
            features: (B, N, C).
            input_ids: (B·R, T), each starting with `<bos>`; the captions of an image are neighbours.
            lengths: Words to read of each of the B·R captions, 0 for a row that only fills the batch. They are on the
                host, because asking a device makes the host wait.
        """

    @abstractmethod
    def init_state(self, features: Tensor) -> State:
        """Return the state before the first word, one row an image, for features (B, N, C)."""

    @abstractmethod
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Read one word of each row.

        Args:
            tokens: (B, R) ids of the words written last; `<bos>` at first.
            state: State that the last call returned for these rows.

        Returns:
            Logits (B, R, V) of the next word, attention (B, R, N), and the new state.
        """

    @abstractmethod
    def reorder(self, state: State, parents: Tensor) -> State:
        """Return a state whose row r of image b continues row `parents[b, r]` of that image; parents is (B, new R)."""

    @abstractmethod
    def select(self, state: State, images: Tensor) -> State:
        """Return the state of some images (kept,)."""

    @torch.no_grad()
    def sharpen(self, temperature: float) -> None:
        """Divide the logits by a temperature, permanently: below 1 the distribution becomes sharper."""
        self.head.weight.div_(temperature)
        self.head.bias.div_(temperature)


def rows_of(values: Tensor, parents: Tensor) -> Tensor:
    """Return `values` (B, R, …) with row `parents[b, r]` of each image as its row r; use it in `Decoder.reorder`."""
    index = parents.view(*parents.shape, *[1] * (values.ndim - 2)).expand(*parents.shape, *values.shape[2:])
    return values.gather(1, index)
