"""Free-running evaluation: caption a split, shared out over the processes, and score it by image id."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from capdist.data.batches import PhotoDataset
from capdist.data.features import FeatureStore
from capdist.data.images import Preprocessing
from capdist.data.loaders import photo_batches
from capdist.data.prepared import Split
from capdist.decoding import SearchOptions, search
from capdist.metrics.scorer import CaptionScorer
from capdist.models.caption_model import CaptionModel
from capdist.text.tokenizer import detokenize
from capdist.text.vocabulary import Vocabulary
from capdist.training.launch import on_main

FAST_METRICS = ("bleu", "rouge_l", "cider")
"""Metrics of a validation; METEOR starts a Java machine and waits for the end of the run."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a split, in every process.

    Attributes:
        metrics: By name; METEOR may be None, with a reason beside it.
        captions: By image id, each image of the split once.
    """

    metrics: dict[str, Any]
    captions: dict[str, str]


@dataclass(frozen=True)
class Evaluator:
    """Captions splits and scores them.

    Attributes:
        accelerator: Of the launch.
        vocabulary: Of the model.
        preprocessing: Of the model.
        options: Of the search.
        batch_size: Images captioned at once by one process.
        num_workers: Loader processes.
    """

    accelerator: Accelerator
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    options: SearchOptions
    batch_size: int
    num_workers: int

    def evaluate(
        self,
        model: CaptionModel,
        split: Split,
        features: FeatureStore | None = None,
        metrics: Sequence[str] = FAST_METRICS,
    ) -> Evaluation:
        """Caption every image of a split that has references, and score all captions together.

        Args:
            model: Unwrapped, on the device.
            split: What to caption.
            features: Of the split, or None to encode its photos.
            metrics: Which.

        Raises:
            DataError: if the split has no references, or a photo cannot be read.
        """
        captions = self.caption(model, split, features)

        def score() -> dict[str, Any]:
            scorer = CaptionScorer({split.image_ids[row]: split.references[row] for row in split.scored_rows})
            scorer.add_many(captions.items())
            return dict(scorer.compute(metrics))

        return Evaluation(on_main(self.accelerator, score), captions)

    @torch.inference_mode()
    def caption(self, model: CaptionModel, split: Split, features: FeatureStore | None) -> dict[str, str]:
        """Return the caption of each image with references by image id, in every process, in the split's order."""
        was_training = model.training
        model.eval()
        mine: list[tuple[int, str]] = []
        rows = split.scored_rows[self.accelerator.process_index :: self.accelerator.num_processes]
        with tqdm(
            total=len(rows), desc=f"caption {split.name}", unit="image", leave=False, delay=1,
            disable=not self.accelerator.is_main_process,
        ) as progress:  # fmt: skip
            for batch_rows, batch_features in self._features(model, split, rows, features):
                with self.accelerator.autocast():
                    result = search(model, batch_features, self.options)
                words = (self.vocabulary.decode(tokens) for tokens in result.tokens[:, 0].tolist())
                mine += zip(batch_rows, map(detokenize, words), strict=True)
                progress.update(len(batch_rows))
        model.train(was_training)
        return {split.image_ids[row]: caption for row, caption in sorted(gather_object(mine))}

    def _features(
        self, model: CaptionModel, split: Split, rows: Sequence[int], store: FeatureStore | None
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        device = self.accelerator.device
        if store is not None:
            for start in range(0, len(rows), self.batch_size):
                chunk = list(rows[start : start + self.batch_size])
                yield chunk, store.features(torch.tensor(chunk)).to(device)
            return
        dataset = PhotoDataset(split.photos, self.preprocessing)
        batches = photo_batches(
            dataset, rows, batch_size=self.batch_size, num_workers=self.num_workers, pin_memory=device.type == "cuda"
        )
        for batch_rows, images in batches:
            with self.accelerator.autocast():
                features = model.encode(self.preprocessing.normalize(images.to(device)))
            yield batch_rows.tolist(), features
