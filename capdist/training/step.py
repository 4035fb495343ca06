"""One optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from capdist.data.batches import CaptionBatch
from capdist.data.captions import seed_of
from capdist.errors import NumericsError
from capdist.features.source import FeatureSource
from capdist.models.caption_model import Output
from capdist.recipe.sections import Recipe
from capdist.training.objectives import Objective, Window

MOST_SKIPPED_STEPS = 30
"""Steps in a row that fp16 scaling may skip. The scale starts at 2^16 and each halves it, so it is useless by then."""


@dataclass(frozen=True)
class StepReport:
    """What a step did, over all processes.

    Attributes:
        loss_sum: This process's share of the loss, not yet divided by words; on the device.
        num_tokens: Number of words in the step, over all processes.
        num_captions: Number of captions in the step, over all processes.
        reward_sum: Rewards of the step's samples, added up over all processes.
        num_samples: Captions that were rewarded, over all processes; 0 where there are no rewards.
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

    The loss is divided by the words of the whole global step. So neither the number of processes nor that of
    micro-batches changes the gradient.

    Args:
        accelerator: Gives the device and the precision, and adds up the gradients of all processes.
        model: The network as `accelerator.prepare` gave it.
        optimizer: As `accelerator.prepare` gave it.
        recipe: Gives the seed and the clipping of gradients.
        source: Gives the features or photos of the training split.
        objective: Makes the loss.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        source: FeatureSource,
        objective: Objective,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.recipe, self.source, self.objective = recipe, source, objective
        self._skipped_in_a_row = 0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(
        self, step: int, window: Sequence[CaptionBatch], stop_requested: bool = False, progress: float = 0.0
    ) -> StepReport:
        """Take a step.

        Args:
            step: Index of the step, counted from 0.
            window: Micro-batches that this process takes in the step.
            stop_requested: Whether this process was told to stop; the step tells the others.
            progress: Share of the run that is over, 0…1.

        Raises:
            NumericsError: if the gradient is not finite; the weights are not changed.
        """
        prepared = self.objective.prepare(step, Window(window))
        window = prepared.batches
        num_tokens, num_captions = sum(b.num_tokens for b in window), sum(b.num_captions for b in window)
        counts = torch.tensor(
            [num_tokens, num_captions, int(stop_requested), prepared.num_samples, prepared.reward_sum],
            dtype=torch.float64 if self.accelerator.device.type != "mps" else torch.float32,
            device=self.accelerator.device,
        )
        *numbers, reward_sum = self.accelerator.reduce(counts, "sum").tolist()
        num_tokens, num_captions, stop, num_samples = map(int, numbers)
        loss_sum = torch.zeros((), device=self.accelerator.device)
        for micro, batch in enumerate(window):
            last = micro == len(window) - 1
            torch.manual_seed(seed_of(self.recipe.run.seed, "dropout", step, micro, self.accelerator.process_index))
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(batch, progress)
                # DDP averages the gradients of the processes; this makes it their sum.
                self.accelerator.backward(loss * (self.accelerator.num_processes / max(1, num_tokens)))
            loss_sum += loss.detach()
        self._update(step)
        return StepReport(loss_sum, num_tokens, num_captions, reward_sum, num_samples, stop > 0)

    def warm_up(self, batch: CaptionBatch) -> None:
        """Run two steps that change nothing.

        DDP rearranges its buckets after the first backward pass, which changes the order in which three or more
        processes are summed. After these steps a fresh run and a resumed one sum in the same order. A lack of memory
        also shows early.
        """
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        for _ in range(2):
            self.accelerator.backward(self._loss(batch))
            self.optimizer.zero_grad()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    def _loss(self, batch: CaptionBatch, progress: float = 0.0) -> Tensor:
        inputs = self.source.inputs(batch)
        batch = replace(batch, images=None).to(self.accelerator.device)
        output: Output = self.model(batch.input_ids, batch.lengths, rewrite=self.objective.rewrite(progress), **inputs)
        return self.objective.loss(output, batch)

    def _update(self, step: int) -> None:
        limit = self.recipe.training.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit if limit is not None else float("inf"))
        assert norm is not None
        scaled = self.accelerator.scaler is not None  # the fp16 scaler finds infinities and skips the step
        if not scaled and not torch.isfinite(norm):
            self.optimizer.zero_grad()
            raise NumericsError(
                f"step {step + 1}: the gradient is {norm.item()}; the weights were not changed. Lower "
                "training.learning_rate, lengthen training.warmup_steps, or use training.mixed_precision=bf16 or no"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Not optimizer_step_was_skipped: accelerate does not notice when a fused optimizer skips a step.
        skipped = scaled and not torch.isfinite(norm)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row > MOST_SKIPPED_STEPS:
            raise NumericsError(
                f"step {step + 1}: fp16 overflowed in {self._skipped_in_a_row} steps in a row; the weights were not "
                "changed. Use training.mixed_precision=bf16 or no, or lower training.learning_rate"
            )
