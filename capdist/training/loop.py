"""The loop: steps, and when to validate, save and stop between two steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn

from capdist.data.batches import CaptionBatch, CaptionDataset, Collator, build_views
from capdist.data.images import Preprocessing, build_augmentation
from capdist.data.loaders import Plan, training_batches
from capdist.data.splits import PreparedData
from capdist.distributed.launch import on_main
from capdist.distributed.stopping import StopSignals
from capdist.evaluation.evaluator import Evaluator
from capdist.features.source import FeatureSource
from capdist.models.caption_model import CaptionModel
from capdist.progress import Progress
from capdist.training import OBJECTIVES
from capdist.training.averaging import WeightAverage
from capdist.training.checkpoints import (
    TrainState,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from capdist.training.optimization import set_learning_rate
from capdist.training.run import Run
from capdist.training.step import StepReport, TrainStep
from capdist.training.tracking import Tracking
from capdist.training.validation import Validation

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
        run: Gives the recipe, the processes and where to go on.
        data: What the run trains on.
        model: The network as `accelerator.prepare` gave it.
        optimizer: As `accelerator.prepare` gave it.
        preprocessing: What photos go through before the encoder.
        sources: Give the features of each split, by its name.
        evaluator: Captions and scores the validation split.
    """

    def __init__(
        self,
        run: Run,
        data: PreparedData,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        preprocessing: Preprocessing,
        sources: Mapping[str, FeatureSource],
        evaluator: Evaluator,
    ) -> None:
        self.run, self.accelerator, self.recipe, self.data = run, run.accelerator, run.recipe, data
        self.optimizer, self.preprocessing, self.sources = optimizer, preprocessing, sources
        accelerator, recipe = run.accelerator, run.recipe
        self.unwrapped = cast(CaptionModel, accelerator.unwrap_model(model))
        self.model = model
        self.state = run.state
        self._saved_step = 0
        self.checkpoints = recipe.run_folder / "checkpoints"
        self.average = WeightAverage(self.unwrapped, decay) if (decay := recipe.training.ema_decay) else None
        choosing = None if data.choosing is None else sources[data.choosing.name]
        self.validate = Validation(run, data, self.unwrapped, preprocessing, choosing, evaluator, self.average)
        kind, source = OBJECTIVES[recipe.training.objective], sources["train"]
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

    def restore(self) -> None:
        """Put the weights and the optimizer of the run's checkpoint in place; without one do nothing.

        Raises:
            CheckpointError: if they do not fit.
        """
        if self.run.checkpoint is None:
            return
        load_checkpoint(self.run.checkpoint, self.unwrapped, self.optimizer, self.average)
        if self.accelerator.scaler is not None and self.state.scaler:
            self.accelerator.scaler.load_state_dict(self.state.scaler)
        self._saved_step = self.state.step
        logger.info(f"resuming after step {self.state.step:,} of {self.total_steps:,} from {self.run.checkpoint}")

    def warm_up(self) -> None:
        """See `TrainStep.warm_up`; a single process has nothing to warm up."""
        if self.accelerator.num_processes > 1:
            self._set_mode()
            keys = self.plan.keys(0, self.accelerator.process_index)[0]
            batch = Collator(self.dataset.captions_per_image)([self.dataset[key] for key in keys])
            if not isinstance(batch, CaptionBatch):
                raise batch
            self.step.warm_up(batch)

    def train(self, tracking: Tracking, signals: StopSignals) -> TrainState:
        """Take all remaining steps.

        Args:
            tracking: Gets every line of the log.
            signals: Tell whether to stop.

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
                meter.start_s += self.validate(self.state, tracking)  # a stage that makes things worse must not be kept
            elif self._owes_validation():
                meter.start_s += self.validate(self.state, tracking)
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
                    meter.start_s += self.validate(self.state, tracking)
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

    def _save(self) -> None:
        if self.accelerator.scaler is not None:
            self.state.scaler = self.accelerator.scaler.state_dict()
        vocabulary, identity = self.data.vocabulary.to_json(), self.run.identity
        assert identity is not None

        def save() -> None:
            save_checkpoint(
                self.checkpoints, self.unwrapped, self.optimizer, vocabulary, self.state, identity, self.average
            )
            prune_checkpoints(self.checkpoints, self.recipe.checkpoint.keep)

        on_main(self.accelerator, save)
        self._saved_step = self.state.step
