"""Self-critical training: samples captions, and rewards each by how much better it is than the others of its image.

Rennie et al., Self-critical Sequence Training for Image Captioning (2017, arXiv:1612.00563); with the baseline of Luo,
A Better Variant of Self-Critical Sequence Training (2020, arXiv:2003.09971).

Shapes: B images, R samples of an image, T words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from capdist.data.batches import CaptionBatch, caption_rows
from capdist.data.captions import reference_ids, seed_of, tokenize_images
from capdist.data.splits import PreparedData
from capdist.decoding import SearchOptions, SearchResult, greedy_search, sample
from capdist.features.source import FeatureSource
from capdist.metrics.rewards import CaptionReward
from capdist.models.caption_model import CaptionModel, Output
from capdist.recipe.sections import Recipe, ScstSection
from capdist.text.vocabulary import IGNORED_LABEL
from capdist.training.objectives import Objective, Window, cross_entropy


class Sampled(NamedTuple):
    """A batch whose captions the model wrote itself.

    Attributes:
        batch: Like the batch it was made of, with `weights`.
        reward_sum: Rewards of all samples, added up.
        num_samples: Number of captions that were rewarded.
    """

    batch: CaptionBatch
    reward_sum: float
    num_samples: int


class SelfCritical(Objective):
    """Learn from rewarded samples: captions of a batch are replaced by samples, each weighted by its advantage.

    The gradient of `advantage * -log p(sample)` is REINFORCE's if the network that learns is the network that drew. So
    there is no dropout, no batch statistics, and no forbidden word. (One choice is not learned: that a caption of
    `max_length` words went on, and was cut.) The rest of a step is that of any other batch.

    Args:
        model: Draws the samples; without the wrapper of `accelerator.prepare`, and always in evaluation mode.
        reward: Scores captions of the training split. `<eos>` counts as a word, so that a caption cut off in the middle
            (`a man with a`) loses by it.
        section: Gives the number of samples, the baseline and the weights of the loss.
        options: How long a sample may be, and the ids of `<bos>`, `<eos>` and `<pad>`.
        source: Gives the features of the training split.
        accelerator: Gives the precision; each of its processes draws its own samples.
        mirrored_words: Words that mean their opposite on a mirrored photo; references describe the original photo.
        seed: The run's; it decides what is drawn.
    """

    trains_with_dropout = False
    # With dropout the network that learns would not be the network that drew, and this would not be the gradient of the
    # reward: training then fails after an epoch or two.

    def __init__(
        self,
        model: CaptionModel,
        reward: CaptionReward,
        section: ScstSection,
        options: SearchOptions,
        source: FeatureSource,
        accelerator: Accelerator,
        *,
        mirrored_words: Mapping[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        # A word that is never drawn is never unlearned. With <unk> forbidden its probability grew from 2 to 20 % in an
        # epoch on Flickr8k, and one epoch later captions were no longer sentences.
        assert not options.suppressed_ids
        self.model, self.reward, self.section, self.options = model, reward, section, options
        self.source, self.accelerator = source, accelerator
        self.mirrored_words, self.seed = mirrored_words or {}, seed

    @classmethod
    def build(
        cls, recipe: Recipe, data: PreparedData, model: CaptionModel, source: FeatureSource, accelerator: Accelerator
    ) -> SelfCritical:
        """See `Objective.build`."""
        scst, vocabulary = recipe.scst, data.vocabulary
        words = tokenize_images(data.splits["train"].references)
        reward = CaptionReward(
            reference_ids(words, vocabulary), cider_weight=scst.cider_weight, bleu_weight=scst.bleu_weight
        )
        options = SearchOptions(
            beam_size=1, max_length=recipe.text.max_length,
            pad_id=vocabulary.pad_id, bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id,
        )  # fmt: skip
        return cls(
            model, reward, scst, options, source, accelerator,
            mirrored_words=vocabulary.mirrored_words, seed=recipe.run.seed,
        )  # fmt: skip

    @staticmethod
    def change_start(model: CaptionModel, recipe: Recipe) -> None:
        """See `Objective.change_start`; `scst.temperature` says why."""
        model.decoder.sharpen(recipe.scst.temperature)

    @staticmethod
    def advise(recipe: Recipe) -> Iterator[str]:
        """See `Objective.advise`."""
        if recipe.training.start_from is None:
            yield "scst with new weights learns from noise; training.start_from names a model that captions"

    def prepare(self, step: int, window: Window) -> Window:
        """See `Objective.prepare`: the captions are replaced by samples."""
        made = []
        for micro, batch in enumerate(window.batches):
            torch.manual_seed(seed_of(self.seed, "samples", step, micro, self.accelerator.process_index))
            with self.accelerator.autocast():
                made.append(self.sample(batch, self.source.features(self.model, batch)))
        return Window(
            [sampled.batch for sampled in made],
            sum(sampled.reward_sum for sampled in made),
            sum(sampled.num_samples for sampled in made),
        )

    def loss(self, output: Output, batch: CaptionBatch) -> Tensor:
        """See `Objective.loss`: the weights of the samples are their advantages."""
        return cross_entropy(output, batch.labels, batch.weights)

    def sample(self, batch: CaptionBatch, features: Tensor) -> Sampled:
        """Sample captions.

        Args:
            batch: Photos with captions; it must be on the host.
            features: (B, N, C), on the device. Torch's global generator decides what is drawn.
        """
        if not batch.num_captions:  # a filler has no weight, so any caption does
            return Sampled(replace(batch, weights=torch.zeros(len(batch.lengths))), 0.0, 0)
        assert not self.model.training
        num_samples = self.section.samples
        captions = self._ids(sample(self.model, features, self.options, num_samples))
        rewards = self._score(batch, captions, num_samples).reshape(-1, num_samples)
        if self.section.baseline == "others":
            # The mean of the others of an image: r - (sum - r) / (n - 1).
            advantages = (rewards - rewards.mean(axis=1, keepdims=True)) * (num_samples / (num_samples - 1))
        else:
            greedy = self._ids(greedy_search(self.model, features, self.options))
            advantages = rewards - self._score(batch, greedy, 1)[:, None]
        made = self._batch(batch, captions, advantages.reshape(-1))
        return Sampled(made, float(rewards.sum()), rewards.size)

    def _score(self, batch: CaptionBatch, captions: NDArray[np.int64], num_rows: int) -> NDArray[np.float64]:
        """Return rewards (B·R,) of captions (B·R, T), R being `num_rows`."""
        mirrored = batch.mirrored.numpy().repeat(num_rows)
        seen = captions.copy()
        for word, opposite in self.mirrored_words.items():
            seen[mirrored] = np.where(captions[mirrored] == word, opposite, seen[mirrored])
        return self.reward(batch.image_rows.numpy().repeat(num_rows), seen)

    def _ids(self, found: SearchResult) -> NDArray[np.int64]:
        """Return tokens (B·R, T + 1) with `<eos>` where a caption ended, -1 behind the end."""
        tokens = nn.functional.pad(found.tokens, (0, 1)).flatten(0, 1)
        lengths, ended = found.lengths.flatten()[:, None], found.ended.flatten()[:, None]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        tokens = tokens.masked_fill(positions >= lengths, -1)
        tokens = tokens.masked_fill((positions == lengths) & ended, self.options.eos_id)
        ids: NDArray[np.int64] = tokens.cpu().numpy()
        return ids

    def _batch(self, batch: CaptionBatch, ids: NDArray[np.int64], advantages: NDArray[np.float64]) -> CaptionBatch:
        tokens = torch.from_numpy(ids)
        tokens = tokens[:, : max(1, int((tokens >= 0).sum(dim=1).max()))]
        labels = tokens.masked_fill(tokens < 0, IGNORED_LABEL)
        weights = torch.from_numpy(advantages).float()
        made = replace(batch, weights=weights, **caption_rows(labels))
        if self.section.cross_entropy_weight:
            return _with_references(batch, made, self.section.cross_entropy_weight)
        return made


def _with_references(batch: CaptionBatch, samples: CaptionBatch, reference_weight: float) -> CaptionBatch:
    """Put the references of each image behind its samples."""
    width = max(samples.labels.shape[1], batch.labels.shape[1])
    num_images = len(batch.image_rows)
    widened = (
        nn.functional.pad(rows, (0, width - rows.shape[1]), value=IGNORED_LABEL).view(num_images, -1, width)
        for rows in (samples.labels, batch.labels)
    )
    assert samples.weights is not None
    references = torch.full((num_images, len(batch.lengths) // num_images), reference_weight)
    weights = torch.cat([samples.weights.view(num_images, -1), references], dim=1).flatten()
    both = replace(batch, weights=weights, **caption_rows(torch.cat([*widened], dim=1).flatten(0, 1)))
    # A step is divided by the words of samples only, so that references add to the gradient of the reward and do not
    # change it.
    return replace(both, num_tokens=samples.num_tokens, num_captions=samples.num_captions)
