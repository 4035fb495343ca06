"""Free-running evaluation: all processes caption a split together, and it is scored by image id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from capdist.data.splits import Split
from capdist.decoding import SearchOptions
from capdist.distributed.launch import on_main
from capdist.features.source import FeatureSource
from capdist.inference.writing import write_captions
from capdist.metrics.scorer import CaptionScorer
from capdist.models.caption_model import CaptionModel
from capdist.progress import Progress
from capdist.text.vocabulary import Vocabulary

FAST_METRICS = ("bleu", "rouge_l", "cider")
"""Metrics of a validation; METEOR, which starts Java, is computed only at the end of the run."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a split, in every process.

    Attributes:
        metrics: Maps the name of each score to its value; METEOR may be None, with a reason beside it.
        captions: Has one caption for each image of the split, by image id.
    """

    metrics: dict[str, Any]
    captions: dict[str, str]


@dataclass(frozen=True)
class Evaluator:
    """Captions splits and scores them.

    Attributes:
        accelerator: The processes of this launch, which share the images.
        vocabulary: Turns ids into the words of a caption.
        options: How captions are searched.
        batch_size: Images captioned at once by one process.
    """

    accelerator: Accelerator
    vocabulary: Vocabulary
    options: SearchOptions
    batch_size: int

    def evaluate(
        self,
        model: CaptionModel,
        split: Split,
        source: FeatureSource,
        metrics: Sequence[str] = FAST_METRICS,
    ) -> Evaluation:
        """Caption every image of a split that has references, and score all captions together.

        Args:
            model: The network without the wrapper of `accelerator.prepare`, on the device.
            split: What to caption.
            source: Gives the features of the split.
            metrics: Metrics to compute, by the names in `capdist.metrics.coco.SCORERS`.

        Raises:
            DataError: if the split has no references, or a photo cannot be read.
        """
        captions = self.caption(model, split, source)

        def score() -> dict[str, Any]:
            scorer = CaptionScorer({split.image_ids[row]: split.references[row] for row in split.scored_rows})
            scorer.add_many(captions.items())
            return dict(scorer.compute(metrics))

        return Evaluation(on_main(self.accelerator, score), captions)

    @torch.inference_mode()
    def caption(self, model: CaptionModel, split: Split, source: FeatureSource) -> dict[str, str]:
        """Caption each image that has references. Every process gets all captions by image id, in the split's order."""
        was_training = model.training
        model.eval()
        mine: list[tuple[int, str]] = []
        rows = split.scored_rows[self.accelerator.process_index :: self.accelerator.num_processes]
        is_main, total = self.accelerator.is_main_process, len(split.scored_rows)
        with Progress(f"caption {split.name}", total, "image", is_brief=True, is_main=is_main) as progress:
            for batch_rows, features in source.batches(model, rows, self.batch_size):
                with self.accelerator.autocast():
                    captions = write_captions(model, features, self.vocabulary, self.options)
                mine += zip(batch_rows, (caption.text for caption in captions), strict=True)
                progress.update(len(batch_rows) * self.accelerator.num_processes)  # the others are about as far
        model.train(was_training)
        return {split.image_ids[row]: caption for row, caption in sorted(gather_object(mine))}
