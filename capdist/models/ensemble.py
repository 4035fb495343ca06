"""An ensemble: several networks that write one caption together.

Shapes: B images, R rows of an image, N cells, C channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capdist.errors import UsageError
from capdist.models.caption_model import CaptionModel
from capdist.models.encoder import Encoder

States = tuple[Any, ...]
"""The state of each member."""


class Ensemble(nn.Module):
    """Averages its members: the probability of a word is the mean of their probabilities.

    A search uses it like a `CaptionModel`: `encode`, then `init_state`, `step`, `reorder`, `select`. Members with the
    same encoder, such as those of runs with a frozen encoder, share one encoding of each photo.

    Args:
        members: Networks with the same vocabulary; they are not changed.
        names: What to call them in errors.
    """

    def __init__(self, members: Sequence[CaptionModel], names: Sequence[str]) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList(members)
        self.names = tuple(names)
        encoders = [member.encoder for member in members]
        # For each member, the first one with the same encoder.
        self._alike = [next(i for i, first in enumerate(encoders) if _is_same(encoder, first)) for encoder in encoders]
        self._encoding = sorted(set(self._alike))

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return the features (B, N, sum of C) of normalised photos (B, 3, height, width), those of all encoders.

        Raises:
            UsageError: if the grids of two encoders differ in their number of cells.
        """
        features = [self.members[index].encode(pixel_values) for index in self._encoding]
        for index, values in zip(self._encoding, features, strict=True):
            if values.shape[1] != features[0].shape[1]:
                raise UsageError(
                    f"{self.names[index]}: looks at {values.shape[1]} cells of a photo, {self.names[0]} at "
                    f"{features[0].shape[1]}; an ensemble is of models with one grid: leave out one of them"
                )
        return torch.cat(features, dim=-1)

    def init_state(self, features: Tensor) -> States:
        """Start one caption an image; features are (B, N, sum of C) from `encode`."""
        channels = [self.members[index].encoder.channels for index in self._encoding]
        parts = dict(zip(self._encoding, features.split(channels, dim=-1), strict=True))
        return tuple(member.init_state(parts[i]) for member, i in zip(self.members, self._alike, strict=True))

    def step(self, tokens: Tensor, state: States) -> tuple[Tensor, Tensor, States]:
        """Read one word a row.

        Args:
            tokens: (B, R) ids of the words written last.
            state: State that the last call returned, with R rows an image.

        Returns:
            Log of the mean probability of the next word (B, R, V), float32; the mean attention (B, R, N); and the new
            state. A log-softmax does not change the first.
        """
        steps = [member.step(tokens, own) for member, own in zip(self.members, state, strict=True)]
        logits, attention, states = zip(*steps, strict=True)
        log_p = torch.stack([values.float().log_softmax(dim=-1) for values in logits])
        return log_p.logsumexp(dim=0) - math.log(len(log_p)), torch.stack(attention).mean(dim=0), states

    def reorder(self, state: States, parents: Tensor) -> States:
        """Continue from other rows; see `Decoder.reorder`."""
        return tuple(member.reorder(own, parents) for member, own in zip(self.members, state, strict=True))

    def select(self, state: States, images: Tensor) -> States:
        """Keep some images; see `Decoder.select`."""
        return tuple(member.select(own, images) for member, own in zip(self.members, state, strict=True))


def _is_same(encoder: Encoder, other: Encoder) -> bool:
    """Return whether two encoders in evaluation mode give the same features."""
    if encoder is other:
        return True
    # Weights say nothing about strides, paddings and activations; the printed network does.
    if encoder.grid != other.grid or str(encoder.network) != str(other.network):
        return False
    weights, others = encoder.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
