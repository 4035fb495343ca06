"""The network of a run with the weights that it starts with."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from capdist.data.captions import seed_of
from capdist.errors import CheckpointError, Mistake, UsageError
from capdist.model_folder import TrainedModel, load_pretrained
from capdist.models.caption_model import CaptionModel, build_model
from capdist.recipe.rules import rules_of
from capdist.recipe.sections import Recipe
from capdist.text.vocabulary import Vocabulary
from capdist.training import OBJECTIVES
from capdist.training.checkpoints import (
    load_weights,
)

logger = logging.getLogger(__name__)


def check_networks(recipes: Sequence[Recipe]) -> None:
    """Build the networks of recipes, without their weights.

    Raises:
        UsageError: as `build_model`, the mistakes of all recipes, each with the name of its run.
    """
    mistakes: list[Mistake] = []
    for recipe in recipes:
        try:
            build_model(recipe.encoder, recipe.decoder, vocab_size=len(Vocabulary(())), pad_id=0, load_weights=False)
        except UsageError as error:
            mistakes += [mistake.at(f"run {recipe.run.name}") for mistake in error.mistakes]
    if mistakes:
        raise UsageError(*mistakes)


def build_network(recipe: Recipe, vocabulary: Vocabulary, checkpoint: Path | None = None) -> CaptionModel:
    """Make the network of a run with the weights that it starts with.

    Args:
        recipe: Says which network, and where its weights come from.
        vocabulary: Holds the words of the training captions.
        checkpoint: The run continues from it, and its encoder may have to fill the feature cache; None for a new run.

    Raises:
        CheckpointError: if a model folder or checkpoint does not fit.
        UsageError, StorageError: as `build_model`.
    """
    folder = recipe.training.start_from and os.path.expanduser(recipe.training.start_from)
    torch.manual_seed(seed_of(recipe.run.seed, "weights"))
    model = build_model(
        recipe.encoder,
        recipe.decoder,
        vocab_size=len(vocabulary),
        pad_id=vocabulary.pad_id,
        load_weights=folder is None,
    )
    if folder is not None and checkpoint is None:
        start_from(folder, model, vocabulary, recipe)
    objective = OBJECTIVES[recipe.training.objective]
    objective.add_layers(model, recipe)
    if checkpoint is None:
        objective.change_start(model, recipe)
    elif folder is not None:
        load_weights(checkpoint, model)
    return model


def start_from(folder: str, model: CaptionModel, vocabulary: Vocabulary, recipe: Recipe) -> None:
    """Give a model the weights of a model folder.

    Raises:
        CheckpointError: if the folder is not whole, or its model has other words or other layers; a line for each.
    """
    try:
        trained = load_pretrained(folder)
    except CheckpointError as error:
        raise CheckpointError(*(mistake.at("training.start_from") for mistake in error.mistakes)) from None
    mistakes = [
        f"training.start_from: {folder}: {section}.{key} is {theirs!r} there, here {ours!r}; set it so, or start anew"
        for section, key, theirs, ours in _other_layers(trained, recipe)
    ]
    if trained.vocabulary.digest != vocabulary.digest:
        mistakes.append(
            f"training.start_from: {folder}: knows {len(trained.vocabulary):,} words, the training captions give "
            f"{len(vocabulary):,}, or others; start from a model of the same captions and text.min_frequency"
        )
    if mistakes:
        raise CheckpointError(*mistakes)
    if recipe.evaluation.halve_validation and trained.chosen_on == "validation":
        logger.warning(
            f"training.start_from: {folder} was chosen on the whole validation split: dev-report tells nothing"
        )
    model.load_state_dict(trained.model.state_dict())


def _other_layers(trained: TrainedModel, recipe: Recipe) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield section, key and both values of what gives the two models other layers."""
    for section in ("encoder", "decoder"):
        theirs, ours = getattr(trained, section).model_dump(), getattr(recipe, section).model_dump()
        for key, rule in rules_of(type(getattr(recipe, section))).items():
            # A key that only one of two decoders has differs because `decoder.name` does.
            if rule.layers and key in theirs and theirs[key] != ours[key]:
                yield section, key, theirs[key], ours[key]
