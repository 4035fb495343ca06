"""Validation: score the model between two steps, and keep the best one."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from typing import Any

from accelerate.utils import broadcast

from capdist.data.images import Preprocessing
from capdist.data.splits import PreparedData
from capdist.distributed.launch import on_main
from capdist.evaluation.evaluator import Evaluator
from capdist.features.source import FeatureSource
from capdist.model_folder import TrainedModel, save_pretrained
from capdist.models.caption_model import CaptionModel
from capdist.training.averaging import WeightAverage
from capdist.training.checkpoints import TrainState
from capdist.training.run import Run
from capdist.training.tracking import Tracking

logger = logging.getLogger(__name__)


class Validation:
    """Scores the model on the split that the best one is chosen on, and keeps the best in the run's `model/`.

    Args:
        run: Gives the folder, the recipe and the processes.
        data: Gives the split and the words.
        model: The network, unwrapped.
        preprocessing: What photos go through; it travels in the model folder.
        source: Features of the split, or None if there is no such split.
        evaluator: Captions the split and scores the captions.
        average: Average of the weights, scored and kept in their place; None = the weights themselves.
    """

    def __init__(
        self,
        run: Run,
        data: PreparedData,
        model: CaptionModel,
        preprocessing: Preprocessing,
        source: FeatureSource | None,
        evaluator: Evaluator,
        average: WeightAverage | None,
    ) -> None:
        self.run, self.data, self.model, self.preprocessing = run, data, model, preprocessing
        self.source, self.evaluator, self.average = source, evaluator, average

    def __call__(self, state: TrainState, tracking: Tracking) -> float:
        """Score the model, keep it if it is the best so far, and return the seconds that this took.

        Args:
            state: Where the run is; best score and step are written into it.
            tracking: Gets the scores.
        """
        started = time.perf_counter()
        state.validated_step = state.step
        with self.average.applied() if self.average is not None else nullcontext():
            if self.source is None:
                self._keep({})  # nothing to choose by: the newest is the best
            else:
                self._score(state, tracking, self.source, started)
        return time.perf_counter() - started

    def _score(self, state: TrainState, tracking: Tracking, source: FeatureSource, started: float) -> None:
        split, choice = self.data.choosing, self.run.recipe.evaluation
        assert split is not None
        # BatchNorm that trains has statistics of its own in each process; those of the main one are saved, so scored.
        for buffer in self.model.buffers():
            buffer.copy_(broadcast(buffer))
        metrics = self.evaluator.evaluate(self.model, split, source).metrics
        seconds = time.perf_counter() - started
        tracking.log({"split": split.name, **metrics, "seconds": seconds}, state.step, group="validation")
        score = metrics[choice.select_by]
        state.stale_validations += 1
        if state.best_score is None or score > state.best_score:
            state.best_score, state.best_step, state.stale_validations = score, state.step, 0
            self._keep({"split": split.name, "chosen_on": split.name, **metrics})
        shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("bleu_1", "bleu_4", "cider"))
        logger.info(f"step {state.step:,}: {split.name} {shown} ({seconds:.0f} s)")

    def _keep(self, metrics: dict[str, Any]) -> None:
        recipe = self.run.recipe
        trained = TrainedModel(
            self.model,
            self.data.vocabulary,
            self.preprocessing,
            recipe.encoder,
            recipe.decoder,
            recipe.text.max_length,
            recipe.evaluation.search,
            metrics,
        )
        on_main(self.run.accelerator, lambda: save_pretrained(trained, recipe.run_folder / "model"))
