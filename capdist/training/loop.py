"""The loop: steps, and what happens between two steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from capdist.data.batches import CaptionBatch, CaptionDataset, Collator, build_views
from capdist.data.images import Preprocessing, build_augmentation
from capdist.data.loaders import Plan, training_batches
from capdist.data.splits import PreparedData
from capdist.distributed.launch import on_main
from capdist.distributed.stopping import StopSignals
from capdist.evaluation.evaluator import Evaluator
from capdist.features.source import FeatureSource
from capdist.model_folder import TrainedModel, save_pretrained
from capdist.models.caption_model import CaptionModel
from capdist.progress import Progress
from capdist.recipe.sections import Recipe
from capdist.training import OBJECTIVES
from capdist.training.averaging import WeightAverage
from capdist.training.checkpoints import (
    Identity,
    TrainState,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from capdist.training.optimization import set_learning_rate
from capdist.training.step import StepReport, TrainStep
from capdist.training.tracking import Tracking

logger = logging.getLogger(__name__)


@dataclass
class Meter:
    """Sums since the last training line; the loss stays on the device until it is read."""

    loss_sum: torch.Tensor
    num_tokens: int = 0
    num_captions: int = 0
    reward_sum: float = 0.0
    num_samples: int = 0
    wait_s: float = 0.0
    start_s: float = field(default_factory=time.perf_counter)

    def add(self, report: StepReport, wait_s: float) -> None:
        """Add a step."""
        self.loss_sum += report.loss_sum
        self.num_tokens += report.num_tokens
        self.num_captions += report.num_captions
        self.reward_sum += report.reward_sum
        self.num_samples += report.num_samples
        self.wait_s += wait_s

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return loss a word, captions/s of all processes, the share of time spent waiting for data, and the reward."""
        seconds = time.perf_counter() - self.start_s
        loss_sum = cast(torch.Tensor, accelerator.reduce(self.loss_sum, "sum")).item()
        values = {
            "loss": loss_sum / max(1, self.num_tokens),
            "captions_per_second": self.num_captions / seconds,
            "data_wait": self.wait_s / seconds,
        }
        return values | ({"reward": self.reward_sum / self.num_samples} if self.num_samples else {})


class Loop:
    """A run from its first step, or the step after a checkpoint, to its last.

    Args:
        accelerator: Of the launch.
        recipe: Of the run.
        data: Prepared.
        model: As `accelerator.prepare` gave it.
        optimizer: Likewise.
        preprocessing: Of photos.
        sources: Features by split.
        evaluator: Of validations.
        identity: Of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        data: PreparedData,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        preprocessing: Preprocessing,
        sources: Mapping[str, FeatureSource],
        evaluator: Evaluator,
        identity: Identity,
    ) -> None:
        self.accelerator, self.recipe, self.data = accelerator, recipe, data
        self.optimizer, self.preprocessing, self.sources = optimizer, preprocessing, sources
        self.evaluator, self.identity = evaluator, identity
        self.unwrapped = cast(CaptionModel, accelerator.unwrap_model(model))
        self.model = model
        self.state = TrainState()
        self._saved_step = 0
        self.checkpoints = recipe.run_folder / "checkpoints"
        self.average = WeightAverage(self.unwrapped, decay) if (decay := recipe.training.ema_decay) else None
        kind, source = OBJECTIVES[recipe.training.stage], sources["train"]
        self.objective = kind.build(recipe, data, self.unwrapped, source, accelerator)
        self.step = TrainStep(accelerator, model, optimizer, recipe, source, self.objective)
        self.plan = Plan.build(
            data.captions,
            captions_per_image=recipe.data.captions_per_image,
            batch_size=recipe.data.batch_size,
            num_processes=accelerator.num_processes,
            accumulation=recipe.training.accumulation,
            seed=recipe.run.seed,
        )
        steps = recipe.training.epochs * self.plan.steps_per_epoch
        self.total_steps = min(steps, recipe.training.max_steps or steps)
        self.dataset = self._dataset()

    def _dataset(self) -> CaptionDataset:
        return CaptionDataset(
            self.sources["train"].photos,
            self.data.captions,
            self.preprocessing,
            build_augmentation(self.recipe.data),
            self.recipe.data.captions_per_image,
            self.recipe.run.seed,
            build_views(self.recipe),
            self.data.vocabulary.mirrored_words,
        )

    def restore(self, path: Path) -> None:
        """Continue from a whole checkpoint of this run, see `check_checkpoint`.

        Raises:
            CheckpointError: if it cannot be read.
        """
        self.state, _ = read_state(path)
        load_checkpoint(path, self.unwrapped, self.optimizer, self.average)
        if self.accelerator.scaler is not None and self.state.scaler:
            self.accelerator.scaler.load_state_dict(self.state.scaler)
        self._saved_step = self.state.step
        logger.info(f"resuming after step {self.state.step:,} of {self.total_steps:,} from {path}")

    def warm_up(self) -> None:
        """See `TrainStep.warm_up`; a single process has nothing to warm up."""
        if self.accelerator.num_processes > 1:
            self._set_mode()
            keys = self.plan.keys(0, self.accelerator.process_index)[0]
            batch = Collator(self.dataset.captions_per_image)([self.dataset[key] for key in keys])
            if not isinstance(batch, CaptionBatch):
                raise batch
            self.step.warm_up(batch)

    def run(self, tracking: Tracking, signals: StopSignals) -> TrainState:
        """Take all remaining steps.

        Args:
            tracking: Hears of the run.
            signals: May ask to stop.

        Returns:
            The state at the end.

        Raises:
            Stopped: after a signal, once a checkpoint is saved.
            DataError, NumericsError: as the steps.
        """
        self._set_mode()
        batches = self._batches()
        meter = self._new_meter()
        with Progress(
            self.recipe.run.name, self.total_steps, "step",
            initial=self.state.step, is_training=True, is_main=self.accelerator.is_main_process,
        ) as progress:  # fmt: skip
            if self.state.step == 0 and self.recipe.training.start_from is not None:
                meter.start_s += self._validate(tracking)  # a stage that makes things worse must not be kept
            elif self._owes_validation():
                meter.start_s += self._validate(tracking)
                self._saved_step = 0
            while self.state.step < self.total_steps and not self._is_stale():
                index = self.state.step
                before = time.perf_counter()
                window = [next(batches) for _ in range(self.plan.micro_batches(index))]
                wait_s = time.perf_counter() - before
                set_learning_rate(self.optimizer, self.recipe.training, index, self.total_steps)
                report = self.step(index, window, bool(signals.received), index / self.total_steps)
                self.state.step += 1
                if self.average is not None:
                    self.average.update(self.state.step)
                meter.add(report, wait_s)
                progress.update()
                if self._is_due(self.recipe.training.log_every):
                    self._log_training(meter, tracking, progress)
                    meter = self._new_meter()
                # Who asks to stop may give less time than a validation takes: the checkpoint comes first.
                if self._ends_epoch(self.recipe.evaluation.every_epochs) and not report.stop:
                    meter.start_s += self._validate(tracking)
                # The best model must not be of a future that a resumed run may not repeat.
                if self._checkpoint_is_due() or report.stop or self.state.best_step == self.state.step:
                    self._save()
                if report.stop:
                    raise signals.stopped(
                        self.accelerator, f"after step {self.state.step}; checkpoint saved, --resume continues"
                    )
        if self._saved_step != self.state.step:
            self._save()  # patience ended the run between two checkpoints
        if signals.agreed(self.accelerator):
            raise signals.stopped(
                self.accelerator, "after the last step; all is saved, --resume gives the final scores"
            )
        return self.state

    def _owes_validation(self) -> bool:
        """Whether the checkpoint was made before its validation, or by a run that was to be longer."""
        over = self.state.step >= self.total_steps or self._ends_epoch(self.recipe.evaluation.every_epochs)
        return over and self.state.step > 0 and self.state.validated_step != self.state.step

    def _set_mode(self) -> None:
        self.model.train(self.objective.trains_with_dropout)

    def _batches(self) -> Iterator[CaptionBatch]:
        return training_batches(
            self.dataset,
            self.plan,
            self.accelerator.process_index,
            range(self.state.step, self.total_steps),
            num_workers=self.recipe.data.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _new_meter(self) -> Meter:
        return Meter(torch.zeros((), device=self.accelerator.device))

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.total_steps

    def _ends_epoch(self, every: int) -> bool:
        return self._is_due(every * self.plan.steps_per_epoch)

    def _checkpoint_is_due(self) -> bool:
        every = self.recipe.checkpoint.every_steps
        return self._is_due(every) if every else self._ends_epoch(1)

    def _is_stale(self) -> bool:
        patience = self.recipe.training.patience
        return patience is not None and self.state.stale_validations >= patience

    def _log_training(self, meter: Meter, tracking: Tracking, progress: Progress) -> None:
        values = meter.read(self.accelerator)
        values["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        values["epoch"] = self.state.step / self.plan.steps_per_epoch
        tracking.log(values, self.state.step, group="train")
        progress.report(values, self.recipe.training.epochs)

    def _validate(self, tracking: Tracking) -> float:
        with self.average.applied() if self.average is not None else nullcontext():
            return self._validate_weights(tracking)

    def _validate_weights(self, tracking: Tracking) -> float:
        """Score the model, keep it if it is the best so far, and return the seconds this took."""
        started = time.perf_counter()
        self.state.validated_step = self.state.step
        split = self.data.choosing
        if split is None:
            self._keep_model({})  # nothing to choose by: the newest is the best
            return time.perf_counter() - started
        # BatchNorm that trains has statistics of its own in each process; those of the main one are saved, so scored.
        for buffer in self.unwrapped.buffers():
            buffer.copy_(broadcast(buffer))
        evaluation = self.evaluator.evaluate(self.unwrapped, split, self.sources[split.name])
        seconds = time.perf_counter() - started
        tracking.log(
            {"split": split.name, **evaluation.metrics, "seconds": seconds}, self.state.step, group="validation"
        )
        score = evaluation.metrics[self.recipe.evaluation.select_by]
        self.state.stale_validations += 1
        if self.state.best_score is None or score > self.state.best_score:
            self.state.best_score, self.state.best_step, self.state.stale_validations = score, self.state.step, 0
            self._keep_model({"split": split.name, "chosen_on": split.name, **evaluation.metrics})
        shown = ", ".join(f"{n} {evaluation.metrics[n]:.3f}" for n in ("bleu_1", "bleu_4", "cider"))
        logger.info(f"step {self.state.step:,}: {split.name} {shown} ({seconds:.0f} s)")
        return time.perf_counter() - started

    def _keep_model(self, metrics: dict[str, Any]) -> None:
        trained = TrainedModel(
            self.unwrapped,
            self.data.vocabulary,
            self.preprocessing,
            self.recipe.encoder,
            self.recipe.decoder,
            self.recipe.text.max_length,
            self.recipe.evaluation.search,
            metrics,
        )
        on_main(self.accelerator, lambda: save_pretrained(trained, self.recipe.run_folder / "model"))

    def _save(self) -> None:
        if self.accelerator.scaler is not None:
            self.state.scaler = self.accelerator.scaler.state_dict()
        vocabulary = self.data.vocabulary.to_json()

        def save() -> None:
            save_checkpoint(
                self.checkpoints, self.unwrapped, self.optimizer, vocabulary, self.state, self.identity, self.average
            )
            prune_checkpoints(self.checkpoints, self.recipe.checkpoint.keep)

        on_main(self.accelerator, save)
        self._saved_step = self.state.step
