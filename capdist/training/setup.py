"""What a run is, said before it starts: to the user, to the log, and to the checkpoints."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from capdist.data.captions import seed_of
from capdist.data.splits import PreparedData
from capdist.distributed.launch import on_main
from capdist.errors import CheckpointError, Mistake, UsageError
from capdist.features.store import weights_digest
from capdist.model_folder import TrainedModel, load_pretrained
from capdist.models.caption_model import CaptionModel, build_model
from capdist.recipe.sections import Recipe, rules_of
from capdist.text.vocabulary import Vocabulary
from capdist.training import OBJECTIVES
from capdist.training.checkpoints import (
    Identity,
    check_identity,
    load_weights,
    read_state,
    recipe_differences,
)
from capdist.training.tracking import LOG
from capdist.version import __version__

logger = logging.getLogger(__name__)


def find_runs(folders: Sequence[Path], accelerator: Accelerator) -> list[Path]:
    """Return the folders in which a run already is."""

    def holds_run(folder: Path) -> bool:
        return (folder / LOG).exists() or any(folder.glob("checkpoints/step_*"))

    return on_main(accelerator, lambda: [folder for folder in folders if holds_run(folder)])


def refuse_to_overwrite(folders: Sequence[Path], accelerator: Accelerator) -> None:
    """Refuse to start anew where runs already are.

    Raises:
        UsageError: saying how to continue them or keep them.
    """
    if taken := find_runs(folders, accelerator):
        how = "continue it with --resume, choose another run.name, or delete the folder"
        raise UsageError(*(f"{folder}: already holds a run; {how}" for folder in taken))


def refuse_to_skip(stages: Sequence[Recipe], accelerator: Accelerator) -> None:
    """Refuse to go on behind stages that were not trained as the recipe says now.

    Raises:
        CheckpointError: with a line for each difference.
    """
    if mistakes := on_main(accelerator, lambda: [mistake for stage in stages for mistake in _not_as_trained(stage)]):
        raise CheckpointError(*mistakes)


def _not_as_trained(recipe: Recipe) -> Iterator[str]:
    folder = recipe.run_folder
    if not (folder / "model").is_dir() or not (folder / "config.yaml").is_file():
        yield (
            f"{folder}: has no config.yaml and model/, though a later stage began, which needs this one; "
            "restore the folder, or delete those of the later stages to train it"
        )
        return
    saved = _saved_recipe(folder / "config.yaml")
    if saved is None:
        yield (
            f"{folder / 'config.yaml'}: is damaged: not YAML sections of keys; restore it, or delete {folder} and the "
            "folders of the later stages to train it again"
        )
        return
    for section, key, before, after, rule in recipe_differences(saved, recipe.to_dict()):
        if rule.resume != "always":
            yield (
                f"{folder}: this stage is over; {section}.{key} was {before!r}, now {after!r}; set it back "
                f"(stages.NAME.{section}.{key} is for one stage), or choose another run.name"
            )


def _saved_recipe(path: Path) -> dict[str, dict[str, Any]] | None:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        return None
    sound = isinstance(values, dict) and all(isinstance(keys, dict) for keys in values.values())
    return values if values and sound else None


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


def identify(recipe: Recipe, data: PreparedData, model: CaptionModel, accelerator: Accelerator) -> Identity:
    """Return what a checkpoint of this run will be compared with."""
    return Identity(
        recipe=recipe.to_dict(),
        vocabulary=data.vocabulary.digest,
        data=data.splits["train"].digest,
        encoder=weights_digest(model.encoder.state_dict()) if model.encoder.is_frozen else "",
        num_processes=accelerator.num_processes,
        mixed_precision=str(accelerator.mixed_precision),
        threads=torch.get_num_threads(),
        versions={"torch": torch.__version__, "machine": platform.machine(), "device": accelerator.device.type},
    )


def check_checkpoint(checkpoint: Path, identity: Identity) -> None:
    """Refuse to continue another run, before anything long is begun.

    Raises:
        CheckpointError: as `read_state` and `check_identity`.
    """
    _, saved = read_state(checkpoint)
    check_identity(checkpoint, saved, identity, logger.warning)


def build_network(recipe: Recipe, vocabulary: Vocabulary, checkpoint: Path | None = None) -> CaptionModel:
    """Make the network of a run with the weights that it starts with.

    Args:
        recipe: Of the run.
        vocabulary: Of its training captions.
        checkpoint: Whole one that the run continues from, whose encoder may have to fill the feature cache.

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
    objective = OBJECTIVES[recipe.training.stage]
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


def describe_start(accelerator: Accelerator, recipe: Recipe, identity: Identity) -> dict[str, Any]:
    """Return the first log line of a start: what took effect, not what was asked for."""
    libraries = ("torch", "torchvision", "accelerate", "datasets", "evaluate", "spacy")
    return {
        "run": recipe.run.name,
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "distributed_type": accelerator.distributed_type.value,
        "threads": identity.threads,
        "versions": {"capdist": __version__, "python": platform.python_version()}
        | {library: version(library) for library in libraries},
    }


def show_start(accelerator: Accelerator, recipe: Recipe, data: PreparedData, model: CaptionModel) -> None:
    """Tell the user what is about to run."""
    for note in data.notes:
        logger.warning(f"data: {note}")
    for note in _idle_settings(recipe, data, model):
        logger.warning(f"recipe: {note}")
    images = ", ".join(f"{len(split.image_ids):,} {name}" for name, split in data.splits.items())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    logger.info(
        f"{recipe.data.source}: {images} images; {len(data.vocabulary):,} words; "
        f"{recipe.encoder.name} + {recipe.decoder.name}: {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M train; "
        f"{accelerator.num_processes} x {accelerator.device}, precision {accelerator.mixed_precision}, "
        f"{torch.get_num_threads()} threads each"
    )


def _idle_settings(recipe: Recipe, data: PreparedData, model: CaptionModel) -> Iterator[str]:
    """Yield settings that will do nothing, or not what they seem to."""
    encoder, training = recipe.encoder, recipe.training
    if model.encoder.is_frozen and encoder.weights == "none" and training.start_from is None:
        yield "encoder.weights=none with a frozen encoder: its features are random; encoder.trainable_from trains it"
    if model.encoder.is_frozen and encoder.batch_norm == "train":
        yield "encoder.batch_norm=train does nothing: the encoder is frozen"
    if model.encoder.is_frozen and encoder.projection is None and training.word_presence:
        yield "training.word_presence does nothing: no features learn; encoder.projection or encoder.trainable_from do"
    if training.stage == "scst" and training.start_from is None:
        yield "training.stage=scst with new weights learns from noise; training.start_from names a model that captions"
    for name, beams in recipe.evaluation.idle().items():
        yield f"evaluation.{name} does nothing with fewer than {beams} beams; raise evaluation.beam_size"
    if data.choosing is None:
        kept = "training.patience does nothing and " if training.patience else ""
        yield f"there is no validation split: {kept}the newest model counts as the best"
