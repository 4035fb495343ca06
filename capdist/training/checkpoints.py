"""Checkpoints: complete or absent, exact, and safe to read, because nothing in them is executed.

A checkpoint is a folder `step_<8 digits>` with `model.safetensors`, `optimizer.safetensors`, `vocabulary.json` and
`state.json`. A run that averages its weights adds `average.safetensors`. The last file, `manifest.json`, has the
digests of the others. It is written under another name, flushed to the disk and renamed, so a folder with the right
name is complete. It is read back only if every digest fits.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from capdist.errors import CheckpointError, reason_of
from capdist.files import staged_folder
from capdist.model_folder import sha256
from capdist.recipe.old_names import rename_old_keys
from capdist.recipe.rules import FIXED, Key, rules_of
from capdist.recipe.sections import Recipe, section_class
from capdist.training.averaging import WeightAverage

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
AVERAGE = "average.safetensors"
logger = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{8})")


@dataclass
class TrainState:
    """Where a run is. Order, augmentation, dropout and learning rate follow from `step` and the recipe.

    Attributes:
        step: Optimizer steps taken.
        best_score: Highest score that a validation has reached; None before the first one.
        best_step: Step that reached it.
        stale_validations: Number of validations since then.
        validated_step: Step that was validated last.
        scaler: What fp16 loss scaling needs to continue; empty with other precisions.
    """

    step: int = 0
    best_score: float | None = None
    best_step: int | None = None
    stale_validations: int = 0
    validated_step: int | None = None
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Identity:
    """What a run must share with a checkpoint to continue it exactly.

    Attributes:
        recipe: The resolved recipe, as `Recipe.to_dict` gives it.
        vocabulary: Digest that changes with the words or their order.
        data: Digest that changes with the images or captions of the training split.
        encoder: Digest of a frozen encoder's weights; empty if the encoder trains.
        num_processes: How many processes share a step.
        mixed_precision: Precision that is used, after the launcher's settings.
        threads: How many processor threads each process uses.
        versions: Names and versions of what computes: libraries, machine and device.
    """

    recipe: dict[str, dict[str, Any]]
    vocabulary: str
    data: str
    encoder: str
    num_processes: int
    mixed_precision: str
    threads: int
    versions: dict[str, str]


class Difference(NamedTuple):
    """A key in which two resolved recipes differ.

    Attributes:
        section: Name that the key's section has.
        key: Name that the key has in its section.
        before: Value that was saved.
        now: Value that the recipe has now.
        rule: Says which changes the key allows.
    """

    section: str
    key: str
    before: Any
    now: Any
    rule: Key


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    vocabulary: str,
    state: TrainState,
    identity: Identity,
    average: WeightAverage | None = None,
) -> Path:
    """Write a checkpoint of `state.step` under `folder` and return its path.

    Args:
        folder: The run's `checkpoints/`.
        model: The network without the wrapper of `accelerator.prepare`.
        optimizer: Its per-parameter tensors are saved; the rates follow from the step.
        vocabulary: Contents of `vocabulary.json`.
        state: Where the run is.
        identity: What the run is.
        average: The averaged weights, if the run has them.
    """
    final = folder / f"step_{state.step:08d}"
    with staged_folder(final, folder / f".tmp_{final.name}") as staging:
        save_model(model, str(staging / MODEL))
        save_file(_flatten(optimizer.state_dict()["state"]), str(staging / OPTIMIZER))
        if average is not None:
            save_file({name: t.contiguous() for name, t in average.tensors.items()}, str(staging / AVERAGE))
        (staging / "vocabulary.json").write_text(vocabulary, encoding="utf-8")
        (staging / STATE).write_text(json.dumps({"state": asdict(state), "identity": asdict(identity)}, indent=1))
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(staging.iterdir())}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in _newest_first(folder):
        if path.name > final.name:  # a damaged, newer one from before the run went back; pruning must not prefer it
            shutil.rmtree(path, ignore_errors=True)
    return final


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed runs left half-written."""
    for path in [*_newest_first(folder)][keep:]:
        shutil.rmtree(path, ignore_errors=True)
    for path in (*folder.glob(".tmp_step_*"), *folder.glob(".old_step_*")):
        shutil.rmtree(path, ignore_errors=True)


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint, or None if there never was one.

    Args:
        folder: The run's `checkpoints/`.
        warn: Called with one line about each damaged checkpoint that is skipped.

    Raises:
        CheckpointError: if there are checkpoints and none is whole; a run never silently starts from nothing.
    """
    damages = []
    for path in _newest_first(folder):
        damage = find_damage(path)
        if damage is None:
            return path
        damages.append(damage)
        warn(f"{damage}; going back to the checkpoint before it")
    if damages:
        raise CheckpointError(
            *damages, f"{folder}: no checkpoint is whole; restore one, or start anew without --resume"
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, expected in manifest.items():
            path = checkpoint / Path(name).name
            if not path.is_file():
                return f"{path}: missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{path}: {path.stat().st_size} bytes, should be {expected['bytes']}"
            if sha256(path) != expected["sha256"]:
                return f"{path}: damaged: its sha256 is not the one in {MANIFEST}"
        if not {MODEL, OPTIMIZER, STATE} <= manifest.keys():
            return f"{checkpoint / MANIFEST}: does not list {MODEL}, {OPTIMIZER} and {STATE}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint / MANIFEST}: unreadable ({error})"
    return None


def read_state(checkpoint: Path) -> tuple[TrainState, Identity]:
    """Read where a checkpoint's run was and what it was.

    Raises:
        CheckpointError: if the file is not of this version.
    """
    try:
        values = json.loads((checkpoint / STATE).read_text())
        recipe, _ = rename_old_keys(values["identity"]["recipe"])
        return TrainState(**values["state"]), Identity(**values["identity"] | {"recipe": recipe})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / STATE}: not a state of this version of capdist ({error})") from None


def check_identity(checkpoint: Path, saved: Identity, now: Identity, warn: Callable[[str], None]) -> None:
    """Refuse to continue another run, listing every difference at once.

    Args:
        checkpoint: Folder that messages name.
        saved: What the checkpoint's run was.
        now: What the run is that would continue.
        warn: Called with one line about each difference that only costs bit-equality.

    Raises:
        CheckpointError: with one line for each difference.
    """
    mistakes = [
        f"{checkpoint}: {section}.{key} was {before!r}, now {after!r}; set it back, or start a run of its own"
        for section, key, before, after, rule in recipe_differences(saved.recipe, now.recipe)
        if rule.resume == "never"
    ]
    if saved.num_processes != now.num_processes:
        mistakes.append(
            f"{checkpoint}: was made by {saved.num_processes} processes, now {now.num_processes}; launch as many"
        )
    if saved.mixed_precision != now.mixed_precision:
        mistakes.append(f"{checkpoint}: was made in precision {saved.mixed_precision}, now {now.mixed_precision}")
    if saved.vocabulary != now.vocabulary:
        mistakes.append(f"{checkpoint}: the training captions now give another vocabulary; restore the captions")
    elif saved.data != now.data:
        mistakes.append(f"{checkpoint}: the training images or captions changed; restore them")
    if saved.encoder != now.encoder:
        mistakes.append(f"{checkpoint}: encoder.weights now gives other weights; name those the run began with")
    if mistakes:
        raise CheckpointError(*mistakes)
    if saved.threads != now.threads:
        warn(f"resuming with {now.threads} threads, was {saved.threads}: close, but not bit-equal (run.threads)")
    for name, version in saved.versions.items():
        if now.versions.get(name) != version:
            warn(f"resuming with {name} {now.versions.get(name)}, was {version}: close, but not bit-equal")


def recipe_differences(
    saved: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> Iterator[Difference]:
    """Yield every key in which two resolved recipes differ.

    Args:
        saved: An older recipe. A key that it lacks had its default.
        now: A current recipe. A key that it lacks is unknown in this version, and may never change.
    """
    for section in {**now, **saved}:
        before, after = dict(saved.get(section, {})), now.get(section, {})
        rules: Mapping[str, Key] = {}
        keys = {**before, **after}
        if section in Recipe.model_fields:
            then, today = section_class(section, before), section_class(section, after)
            before = then().model_dump(mode="json", by_alias=True) | before
            rules = rules_of(today)
            # If `decoder.name` differs, so do the keys that only one of the decoders has.
            keys = {**before, **after} if then is today else {key: None for key in before if key in after}
        for key in sorted(keys):
            if before.get(key) != after.get(key):
                yield Difference(section, key, before.get(key), after.get(key), rules.get(key, FIXED))


def load_checkpoint(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None
) -> None:
    """Load weights, their average and the optimizer state from a checkpoint that was already verified.

    Raises:
        CheckpointError: if they do not fit the model.
    """
    load_weights(checkpoint, model)
    try:
        state = _unflatten(load_file(checkpoint / OPTIMIZER))
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        _lay_out(optimizer)
        if average is not None:
            saved = load_file(checkpoint / AVERAGE)
            for name, tensor in average.tensors.items():
                tensor.copy_(saved[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint}: does not fit this model ({reason_of(error)})") from None


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load the weights from a checkpoint that was already verified.

    Raises:
        CheckpointError: if they do not fit the model.
    """
    try:
        load_model(model, checkpoint / MODEL)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: does not fit this model ({reason_of(error)})") from None


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give each tensor the memory layout of its parameter, because a fused optimizer reads both in the same order."""
    for parameter, state in optimizer.state.items():
        for name, tensor in state.items():
            if tensor.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def _flatten(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{index}.{name}": t.contiguous() for index, tensors in state.items() for name, t in tensors.items()}


def _unflatten(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    return state


def _newest_first(folder: Path) -> Iterator[Path]:
    paths = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    yield from sorted(paths, reverse=True)
