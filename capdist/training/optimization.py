"""Optimizer and learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from capdist.models.caption_model import CaptionModel
from capdist.recipe.sections import TrainingSection


def build_optimizer(model: CaptionModel, training: TrainingSection) -> torch.optim.Optimizer:
    """Make the recipe's optimizer over the parameters that train, each group with its peak rate as `peak_lr`."""
    groups = list(_parameter_groups(model, training))
    # The fused form passes over each tensor once, the plain form on a CPU a dozen times.
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=training.learning_rate, fused=fused)


def _parameter_groups(model: CaptionModel, training: TrainingSection) -> Iterator[dict[str, Any]]:
    decay = training.weight_decay if training.optimizer == "adamw" else 0.0
    encoder_lr = training.encoder_learning_rate or training.learning_rate
    encoder = {id(parameter) for parameter in model.encoder.parameters()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    buckets: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            lr = encoder_lr if id(parameter) in encoder else training.learning_rate
            decays = parameter.ndim >= 2 and id(parameter) not in embeddings
            buckets.setdefault((lr, decay if decays else 0.0), []).append(parameter)
    for (lr, weight_decay), parameters in buckets.items():
        yield {"params": parameters, "peak_lr": lr, "lr": lr, "weight_decay": weight_decay}


def set_learning_rate(optimizer: torch.optim.Optimizer, training: TrainingSection, step: int, total_steps: int) -> None:
    """Set the rates of a step. They depend on the step alone, so there is no scheduler whose state could be lost.

    Args:
        optimizer: What `build_optimizer` returned.
        training: Gives the warm-up and the schedule.
        step: Index of the step, counted from 0.
        total_steps: How many steps the whole run has.
    """
    factor = schedule(step, total_steps, training.warmup_steps, training.schedule)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def schedule(step: int, total_steps: int, warmup_steps: int, kind: str) -> float:
    """Return the share of the peak rate at a step: linear warm-up, then constant, or half a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
