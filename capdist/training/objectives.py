"""What training optimises: an objective makes a loss of the network's output, and may change the batch before.

Shapes: B images, R captions an image, T words, W words that are read, N cells, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from capdist.data.batches import CaptionBatch
from capdist.data.splits import PreparedData
from capdist.features.source import FeatureSource
from capdist.models.caption_model import CaptionModel, Output, Rewrite
from capdist.models.decoder import Decoder
from capdist.recipe.sections import Recipe
from capdist.text.vocabulary import IGNORED_LABEL


@dataclass(frozen=True)
class Window:
    """The micro-batches of one process in one step.

    Attributes:
        batches: Lie on the host.
        reward_sum: Sums the rewards of this process's samples.
        num_samples: Captions that were rewarded; 0 where there are no rewards.
    """

    batches: Sequence[CaptionBatch]
    reward_sum: float = 0.0
    num_samples: int = 0


class Objective(ABC):
    """What a run optimises."""

    trains_with_dropout: ClassVar[bool] = True
    """Whether the network is in training mode during steps."""

    @classmethod
    @abstractmethod
    def build(
        cls, recipe: Recipe, data: PreparedData, model: CaptionModel, source: FeatureSource, accelerator: Accelerator
    ) -> Objective:
        """Make the objective of a run.

        Args:
            recipe: Gives the settings of the objective.
            data: What the run trains on.
            model: The network, unwrapped.
            source: Gives the features of the training split.
            accelerator: Gives device and precision.
        """

    @staticmethod
    def add_layers(model: CaptionModel, recipe: Recipe) -> None:
        """Add the layers that only this objective needs; by default none."""
        return

    @staticmethod
    def change_start(model: CaptionModel, recipe: Recipe) -> None:
        """Change the weights that a new run starts with; a resumed run has the changed ones already."""
        return

    @staticmethod
    def advise(recipe: Recipe) -> Iterator[str]:
        """Yield a line for each setting of this objective that has an effect few want."""
        yield from ()

    def prepare(self, step: int, window: Window) -> Window:
        """Return the micro-batches to learn in place of those that were loaded.

        Args:
            step: Counts the steps from 0.
            window: As loaded.
        """
        return window

    def rewrite(self, progress: float) -> Rewrite | None:
        """Return how to change the words that the decoder reads, see `CaptionModel.forward`.

        Args:
            progress: Share of the run that is over, 0…1.
        """
        return None

    @abstractmethod
    def loss(self, output: Output, batch: CaptionBatch) -> Tensor:
        """Return the loss summed over the words of a batch; the step divides it by the words of all processes.

        Args:
            output: What the network makes of the batch.
            batch: Lies on the device.
        """


class CrossEntropy(Objective):
    """Learn the captions of people word by word.

    Args:
        recipe: `training.label_smoothing`, `scheduled_sampling`, `doubly_stochastic` and `word_presence` count.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.training = recipe.training

    @classmethod
    def build(
        cls, recipe: Recipe, data: PreparedData, model: CaptionModel, source: FeatureSource, accelerator: Accelerator
    ) -> CrossEntropy:
        """See `Objective.build`."""
        return cls(recipe)

    @staticmethod
    def add_layers(model: CaptionModel, recipe: Recipe) -> None:
        """See `Objective.add_layers`."""
        if recipe.training.word_presence:
            model.add_word_head(recipe.decoder.dropout)

    def rewrite(self, progress: float) -> Rewrite | None:
        """See `Objective.rewrite`."""
        share = self.training.scheduled_sampling * progress
        return partial(sample_words, share=share) if share else None

    def loss(self, output: Output, batch: CaptionBatch) -> Tensor:
        """See `Objective.loss`."""
        total = cross_entropy(output, batch.labels, batch.weights, self.training.label_smoothing)
        if self.training.doubly_stochastic:
            total = total + self.training.doubly_stochastic * doubly_stochastic(output, batch.labels)
        if self.training.word_presence:
            total = total + self.training.word_presence * word_presence(output, batch.labels)
        return total


def cross_entropy(
    output: Output, labels: Tensor, weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Return the negative log-likelihood of the labels, summed over words.

    Args:
        output: What the network makes of the captions.
        labels: (B·R, T), `a dog <eos>`, then `IGNORED_LABEL`.
        weights: (B·R,) by which the words of each caption are multiplied; None = 1.
        label_smoothing: Share of probability spread over all words (Szegedy et al. 2016).
    """
    targets = labels.flatten()[output.words]
    of_words = F.cross_entropy(output.logits, targets, label_smoothing=label_smoothing, reduction="none")
    if weights is not None:
        of_words = of_words * weights[output.words // labels.shape[1]]
    return of_words.sum()


def doubly_stochastic(output: Output, labels: Tensor) -> Tensor:
    """Return the penalty of Xu et al. (2015), equation 14, summed over captions.

    For each cell of the published grid it is (1 - attention that the cell got from all words)².

    Args:
        output: What the network makes of the captions; the decoder must tell its attention.
        labels: (B·R, T), with `IGNORED_LABEL` where there is no word.
    """
    assert output.attention is not None
    copies = output.cell_copies
    of_captions = copies * ((1 - output.attention / copies) ** 2).sum(dim=-1)
    return (of_captions * (labels[:, 0] != IGNORED_LABEL)).sum()


def word_presence(output: Output, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of which words the captions of each image have, summed over words and images.

    Args:
        output: What the network makes of the captions; it must have a word head.
        labels: (B·R, T), with `IGNORED_LABEL` where there is no word.
    """
    logits = output.word_presence
    assert logits is not None
    words = labels.view(len(logits), -1)
    has_captions = (words != IGNORED_LABEL).any(dim=1)
    # Positions without a word go to a column of their own, which is dropped.
    present = logits.new_zeros(len(words), logits.shape[1] + 1)
    present.scatter_(1, words.where(words != IGNORED_LABEL, logits.shape[1]), 1.0)
    of_images = F.binary_cross_entropy_with_logits(logits, present[:, :-1], reduction="none").sum(dim=1)
    return (of_images * has_captions).sum()


@torch.no_grad()
def sample_words(
    decoder: Decoder[Any], features: Tensor, input_ids: Tensor, lengths: Sequence[int], *, share: float
) -> Tensor:
    """Replace words of people by words that the decoder draws: scheduled sampling (Bengio et al. 2015).

    Two passes (Duckworth et al. 2019) draw all words at once: each follows the words of people before it.

    Args:
        decoder: Draws the words.
        features: (B, N, C).
        input_ids: (B·R, T), starting with `<bos>`, which stays.
        lengths: Count the words to read of each caption.
        share: Share of the words that are replaced.
    """
    reading = decoder.read(features, input_ids, lengths)
    chances = reading.logits.float().softmax(dim=-1)
    # This draws like `multinomial`, which would end the program where weights are not finite any more.
    drawn = (chances / torch.empty_like(chances).exponential_()).argmax(dim=-1)
    place = reading.words + 1  # what is said at a position is read at the next one of the same caption
    chosen = (torch.rand(len(place), device=place.device) < share) & (place % input_ids.shape[1] != 0)
    mixed = F.pad(input_ids.flatten(), (0, 1))
    mixed[place] = drawn.where(chosen, mixed[place])
    # In older versions of torch a cast that autocast keeps of this pass has no gradient in the next one (pytorch issue
    # 112583).
    torch.clear_autocast_cache()
    return mixed[:-1].view_as(input_ids)
