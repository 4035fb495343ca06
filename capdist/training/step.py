"""One optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from capdist.config import Recipe
from capdist.data.batches import CaptionBatch
from capdist.data.captions import seed_of
from capdist.data.features import FeatureStore
from capdist.data.images import Preprocessing
from capdist.errors import NumericsError
from capdist.training.self_critical import SelfCritical

MOST_SKIPPED_STEPS = 30
"""Steps in a row that fp16 scaling may skip: from its start at 2^16 it is halved at each, far below any use by then."""


@dataclass(frozen=True)
class StepReport:
    """What a step did, over all processes.

    Attributes:
        loss_sum: This process's share of the loss, not yet divided by words; on the device.
        num_tokens: Words of the step, over all processes.
        num_captions: Captions of the step, over all processes.
        reward_sum: Of the samples of a self-critical step, over all processes.
        num_samples: Their number, over all processes; 0 in any other step.
        stop: Whether any process was told to stop.
    """

    loss_sum: Tensor
    num_tokens: int
    num_captions: int
    reward_sum: float
    num_samples: int
    stop: bool


class TrainStep:
    """Forward, backward and update over the micro-batches of one step.

    The loss is divided by the words of the whole global step, so that neither the split over processes nor that over
    micro-batches changes the gradient.

    Args:
        accelerator: Of the launch.
        model: As `accelerator.prepare` gave it.
        optimizer: Likewise.
        recipe: Of the run.
        preprocessing: Of photos.
        features: Of the training split, or None when the encoder runs in the step.
        self_critical: Replaces captions by samples of the model, or None to learn the captions as they are.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        preprocessing: Preprocessing,
        features: FeatureStore | None,
        self_critical: SelfCritical | None = None,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.recipe, self.preprocessing, self.features = recipe, preprocessing, features
        self.self_critical = self_critical
        self._skipped_in_a_row = 0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(
        self, step: int, window: Sequence[CaptionBatch], stop_requested: bool = False, progress: float = 0.0
    ) -> StepReport:
        """Take a step.

        Args:
            step: Its index from 0.
            window: This process's micro-batches.
            stop_requested: Whether this process was told to stop; shared with the others on the way.
            progress: Share of the run that is over, 0…1.

        Raises:
            NumericsError: if the gradient is not finite; the weights are as they were.
        """
        photos: list[dict[str, Tensor] | None] = [None] * len(window)
        reward_sum, num_samples = 0.0, 0
        if self.self_critical is not None:
            photos = [self._photos(batch) for batch in window]
            window, reward_sum, num_samples = self._sampled(step, window, photos)
        num_tokens, num_captions = sum(b.num_tokens for b in window), sum(b.num_captions for b in window)
        counts = torch.tensor(
            [num_tokens, num_captions, int(stop_requested), num_samples, reward_sum],
            dtype=torch.float64 if self.accelerator.device.type != "mps" else torch.float32,
            device=self.accelerator.device,
        )
        *numbers, reward_sum = self.accelerator.reduce(counts, "sum").tolist()
        num_tokens, num_captions, stop, num_samples = map(int, numbers)
        loss_sum = torch.zeros((), device=self.accelerator.device)
        for micro, (batch, of_batch) in enumerate(zip(window, photos, strict=True)):
            last = micro == len(window) - 1
            torch.manual_seed(seed_of(self.recipe.run.seed, "dropout", step, micro, self.accelerator.process_index))
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(batch, of_batch, progress)
                # DDP averages the gradients of the processes; this makes it their sum.
                self.accelerator.backward(loss * (self.accelerator.num_processes / max(1, num_tokens)))
            loss_sum += loss.detach()
        self._update(step)
        return StepReport(loss_sum, num_tokens, num_captions, reward_sum, num_samples, stop > 0)

    def _sampled(
        self, step: int, window: Sequence[CaptionBatch], photos: Sequence[Any]
    ) -> tuple[Sequence[CaptionBatch], float, int]:
        """Return batches of samples in place of captions, and the sum and number of their rewards."""
        assert self.self_critical is not None
        made = []
        for micro, (batch, of_batch) in enumerate(zip(window, photos, strict=True)):
            torch.manual_seed(seed_of(self.recipe.run.seed, "samples", step, micro, self.accelerator.process_index))
            with self.accelerator.autocast():
                features = of_batch["features"] if "features" in of_batch else self._encoded(of_batch["pixel_values"])
                made.append(self.self_critical(batch, features))
        return [s.batch for s in made], sum(s.reward_sum for s in made), sum(s.num_samples for s in made)

    def warm_up(self, batch: CaptionBatch) -> None:
        """Run two steps that change nothing.

        DDP lays its buckets out anew after the first backward pass, which changes the order in which three or more
        processes are summed. After this a fresh run and a resumed one sum alike, and a lack of memory shows early.
        """
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        for _ in range(2):
            self.accelerator.backward(self._loss(batch))
            self.optimizer.zero_grad()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    def _loss(self, batch: CaptionBatch, photos: dict[str, Tensor] | None = None, progress: float = 0.0) -> Tensor:
        training = self.recipe.training
        inputs = self._inputs(batch) | (self._photos(batch) if photos is None else photos)
        if self.self_critical is not None:  # a sample is learned for its reward, and nothing else is
            return self.model(**inputs).cross_entropy
        own_words = training.scheduled_sampling * progress
        losses = self.model(label_smoothing=training.label_smoothing, own_words=own_words, **inputs)
        loss: Tensor = losses.cross_entropy + training.doubly_stochastic * losses.doubly_stochastic
        return loss + training.word_presence * losses.word_presence

    def _inputs(self, batch: CaptionBatch) -> dict[str, Any]:
        tensors = {"input_ids": batch.input_ids, "labels": batch.labels, "weights": batch.weights}
        device = self.accelerator.device
        moved = {name: t.to(device, non_blocking=True) for name, t in tensors.items() if t is not None}
        return {**moved, "lengths": batch.lengths}

    def _photos(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Return `features`, or `pixel_values` when the encoder runs in the step, on the device."""
        device = self.accelerator.device
        if self.features is not None:
            return {"features": self.features.features(batch.feature_rows).to(device, non_blocking=True)}
        assert batch.images is not None
        return {"pixel_values": self.preprocessing.normalize(batch.images.to(device, non_blocking=True))}

    @torch.no_grad()
    def _encoded(self, pixel_values: Tensor) -> Tensor:
        assert self.self_critical is not None
        return self.self_critical.model.encode(pixel_values)

    def _update(self, step: int) -> None:
        limit = self.recipe.training.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit if limit is not None else float("inf"))
        assert norm is not None
        scaled = self.accelerator.scaler is not None  # fp16 finds infinities by itself and skips the step
        if not scaled and not torch.isfinite(norm):
            self.optimizer.zero_grad()
            raise NumericsError(
                f"step {step + 1}: the gradient is {norm.item()}; the weights were not changed. Lower "
                "training.learning_rate, lengthen training.warmup_steps, or use training.mixed_precision=bf16 or no"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Not optimizer_step_was_skipped: a fused optimizer skips by itself, which accelerate does not hear of.
        skipped = scaled and not torch.isfinite(norm)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row > MOST_SKIPPED_STEPS:
            raise NumericsError(
                f"step {step + 1}: fp16 overflowed in {self._skipped_in_a_row} steps in a row; the weights were not "
                "changed. Use training.mixed_precision=bf16 or no, or lower training.learning_rate"
            )
