"""A run: its folder, which this launch holds, the checkpoint that it continues from, and what makes it this run."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from capdist.data.splits import PreparedData
from capdist.distributed.launch import exclusive, on_main
from capdist.errors import CheckpointError, UsageError
from capdist.features.store import weights_digest
from capdist.models.caption_model import CaptionModel
from capdist.recipe.advice import advise
from capdist.recipe.old_names import rename_old_keys
from capdist.recipe.sections import Recipe
from capdist.training import OBJECTIVES
from capdist.training.checkpoints import (
    Identity,
    TrainState,
    check_identity,
    newest_checkpoint,
    read_state,
    recipe_differences,
)
from capdist.training.tracking import LOG
from capdist.version import __version__

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run that this launch holds; see `Run.open`.

    Attributes:
        recipe: Says what the run trains.
        accelerator: Gives device and precision, and joins the processes.
        checkpoint: The run continues from it, and every file of it is whole; None where the run begins.
        state: Where the run goes on.
        identity: What makes it this run, once `identify` has found out.
    """

    recipe: Recipe
    accelerator: Accelerator
    checkpoint: Path | None = None
    state: TrainState = field(default_factory=TrainState)
    identity: Identity | None = None
    _saved: Identity | None = None

    @classmethod
    @contextmanager
    def open(cls, recipe: Recipe, accelerator: Accelerator, *, resume: bool) -> Iterator[Run]:
        """Hold the folder of a run, and find and verify the checkpoint that it continues from.

        The lock ends with the context, or with the process.

        Args:
            recipe: Says what the run trains, and names its folder.
            accelerator: The processes of this launch, which all call this together.
            resume: Whether to continue the run that is in the folder.

        Raises:
            UsageError: if another process holds the folder, or without `resume` a run is in it.
            CheckpointError: if there are checkpoints and none is whole.
        """
        with exclusive(recipe.run_folder, accelerator):
            if not resume:
                refuse_to_overwrite([recipe.run_folder], accelerator)
            checkpoint = _find_checkpoint(recipe, accelerator) if resume else None
            state, saved = (TrainState(), None) if checkpoint is None else read_state(checkpoint)
            yield cls(recipe, accelerator, checkpoint, state, _saved=saved)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.recipe.run_folder

    def identify(self, data: PreparedData, model: CaptionModel) -> None:
        """Find out what makes it this run, and refuse the checkpoint of another one before anything long begins.

        Raises:
            CheckpointError: with a line for each difference.
        """
        accelerator = self.accelerator
        self.identity = Identity(
            recipe=self.recipe.to_dict(),
            vocabulary=data.vocabulary.digest,
            data=data.splits["train"].digest,
            encoder=weights_digest(model.encoder.state_dict()) if model.encoder.is_frozen else "",
            num_processes=accelerator.num_processes,
            mixed_precision=str(accelerator.mixed_precision),
            threads=torch.get_num_threads(),
            versions={"torch": torch.__version__, "machine": platform.machine(), "device": accelerator.device.type},
        )
        if self.checkpoint is not None and self._saved is not None:
            check_identity(self.checkpoint, self._saved, self.identity, logger.warning)

    def show(self, data: PreparedData, model: CaptionModel) -> None:
        """Tell the user what is about to run."""
        recipe, accelerator = self.recipe, self.accelerator
        for note in data.notes:
            logger.warning(f"data: {note}")
        objective = OBJECTIVES[recipe.training.objective]
        for note in (*advise(recipe, has_validation=data.choosing is not None), *objective.advise(recipe)):
            logger.warning(f"recipe: {note}")
        images = ", ".join(f"{len(split.image_ids):,} {name}" for name, split in data.splits.items())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        logger.info(
            f"{recipe.data.source}: {images} images; {len(data.vocabulary):,} words; "
            f"{recipe.encoder.name} + {recipe.decoder.name}: {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M "
            f"train; {accelerator.num_processes} x {accelerator.device}, precision {accelerator.mixed_precision}, "
            f"{torch.get_num_threads()} threads each"
        )

    def describe(self) -> dict[str, Any]:
        """Return the first log line of a start: what took effect, not what was asked for."""
        libraries = ("torch", "torchvision", "accelerate", "datasets", "evaluate", "spacy")
        return {
            "run": self.recipe.run.name,
            "num_processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "mixed_precision": self.accelerator.mixed_precision,
            "distributed_type": self.accelerator.distributed_type.value,
            "threads": torch.get_num_threads(),
            "versions": {"capdist": __version__, "python": platform.python_version()}
            | {library: version(library) for library in libraries},
        }


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
    return rename_old_keys(values)[0] if values and sound else None


def _find_checkpoint(recipe: Recipe, accelerator: Accelerator) -> Path | None:
    """Return the newest whole checkpoint of a run, or None if there never was one; on all processes."""
    folder = recipe.run_folder / "checkpoints"
    path = on_main(accelerator, lambda: newest_checkpoint(folder, logger.warning))
    if path is None:
        logger.info(f"no checkpoint in {folder} yet: starting from the beginning")
    return path
