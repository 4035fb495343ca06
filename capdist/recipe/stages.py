"""Stages of a recipe: what each may change, and how one goes on from the one before."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from capdist.errors import Mistake, UsageError, nearest, show_value
from capdist.recipe.rules import rules_of
from capdist.recipe.sections import Recipe

Places = dict[tuple[str, ...], str]
"""Where each key of a recipe is from: file and line, or the command line."""

COMMAND_LINE = "command line"
_STARTS = ("a stage starts from the one before", "only the first may say")


def check_stages(stages: Any, places: Places, mistakes: list[Mistake]) -> dict[str, dict[str, Any]]:
    """Return the stages that make sense, telling of the others."""
    place = places.get(("stages",), "recipe")
    if not isinstance(stages, dict) or not stages:
        raise UsageError(
            Mistake("stages", f"names stages, each with sections of keys, found {show_value(stages)}", place=place)
        )
    sound = {}
    for name, changes in stages.items():
        place = places.get(("stages", str(name)), place)
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w\-]*", name):
            mistakes.append(Mistake(f"stages.{name}", "must be a name of letters, digits, '-' and '_'", place=place))
        elif not isinstance(changes, dict | None) or not all(
            isinstance(keys, dict | None) for keys in (changes or {}).values()
        ):
            found = f"expected sections of keys, found {show_value(changes)}"
            mistakes.append(Mistake(f"stages.{name}", found, place=place))
        elif name != next(iter(stages)) and "start_from" in ((changes or {}).get("training") or {}):
            place = places.get(("stages", name, "training", "start_from"), place)
            mistakes.append(Mistake("training.start_from", *_STARTS, place))
        else:
            sound[name] = {section: keys or {} for section, keys in (changes or {}).items()}
    return sound


def overrides_of_no_stage(overrides: Sequence[str], stages: Mapping[str, Any]) -> list[Mistake]:
    """Return mistakes for overrides of one stage that could not take effect."""
    mistakes = []
    for override in overrides:
        if not override.startswith("stages."):
            continue
        _, name, *key = override.partition("=")[0].split(".")
        names = [str(stage) for stage in stages]  # what is no text is a mistake that is told elsewhere
        if name not in names:
            mistakes.append(Mistake(f"stages.{name}", f"no such stage{nearest(name, names)}", place=COMMAND_LINE))
        elif not key:
            right = f"write stages.{name}.section.key=value"
            mistakes.append(Mistake("", f"{override!r} changes nothing", right, COMMAND_LINE))
        elif key == ["training", "start_from"] and name != names[0]:
            mistakes.append(Mistake(f"stages.{name}.{'.'.join(key)}", *_STARTS, COMMAND_LINE))
    return mistakes


def merge_stage(
    values: Mapping[str, Any], places: Places, stage: str, changes: Mapping[str, Any]
) -> tuple[dict[str, Any], Places]:
    """Return the values of a stage, and where they are from."""
    merged: dict[str, Any] = copy.deepcopy(dict(values))
    for section, keys in changes.items():
        base = merged.get(section) or {}
        merged[section] = {**base, **keys} if isinstance(base, dict) else base
    above = ("stages", stage)
    return merged, places | {place[2:]: where for place, where in places.items() if place[:2] == above and place[2:]}


def differences_between_stages(recipes: Sequence[Recipe], names: Sequence[str], places: Places) -> list[Mistake]:
    """Return mistakes for keys in which stages differ although their models could not go on from each other."""
    mistakes = []
    first = recipes[0].to_dict()
    for name, recipe in zip(names, recipes, strict=True):
        for section, keys in recipe.to_dict().items():
            rules = rules_of(type(getattr(recipe, section)))
            for key, value in keys.items():
                # A key that only one of two decoders has differs because `decoder.name` does.
                if not rules[key].stages and key in first[section] and value != first[section][key]:
                    where = (("stages", stage, section, key) for stage in (name, *names))
                    place = next((places[key] for key in where if key in places), f"{COMMAND_LINE}: stages.{name}")
                    found = "must be the same in all stages"
                    mistakes.append(Mistake(f"{section}.{key}", found, "set it outside them", place))
    return mistakes


def chain_stages(recipes: Sequence[Recipe], names: Sequence[str]) -> list[Recipe]:
    """Give each stage its run name, and the model of the one before it to start from."""
    chained: list[Recipe] = []
    for index, (name, recipe) in enumerate(zip(names, recipes, strict=True)):
        run, training = recipe.run, recipe.training
        if index < len(recipes) - 1:
            run = run.model_copy(update={"name": f"{run.name}-{name}"})
        if chained:
            training = training.model_copy(update={"start_from": str(chained[-1].run_folder / "model")})
        chained.append(recipe.model_copy(update={"run": run, "training": training}))
    return chained
