"""Recipe files and overrides: read, checked, saved.

All mistakes of a recipe are reported together, each with its file, line and key, and the nearest right name.
"""

from __future__ import annotations

import copy
import errno
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from capdist.errors import Mistake, UsageError, nearest_name, show_value
from capdist.files import write_atomically
from capdist.recipe.decoders import DECODER_SECTIONS
from capdist.recipe.names import find_recipe, say_once
from capdist.recipe.old_names import RENAMED_KEYS, tell_renamed, with_new_names
from capdist.recipe.rules import keys_of, wrong_value
from capdist.recipe.sections import Recipe, recipe_keys, section_class, section_classes, start_in_own_folder
from capdist.recipe.stages import (
    COMMAND_LINE,
    Places,
    chain_stages,
    check_stages,
    differences_between_stages,
    merge_stage,
    overrides_of_no_stage,
)


class _RecipeLoader(yaml.SafeLoader):
    """YAML whose numbers are those of JSON: 3e-4 is a float, 010 is not octal, and only true/false are booleans."""


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf)|\.(nan|NaN))$"),
    list("-+.0123456789"),
)


_NULLS = ("", "~", "null", "Null", "NULL")
_UNREADABLE_VALUE = (ValueError, KeyError, AttributeError, RecursionError)


class _RecipeDumper(yaml.SafeDumper):
    """Quotes every text that `_RecipeLoader` would read as something else."""


_RecipeDumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + _RecipeLoader.yaml_implicit_resolvers.get(first, [])
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_RecipeLoader.yaml_implicit_resolvers}
}


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML that `load_recipe` reads back."""
    write_atomically(path, yaml.dump(recipe.to_dict(), Dumper=_RecipeDumper, sort_keys=False))


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, is_saved: bool = False) -> Recipe:
    """Read a recipe file, apply overrides, check everything.

    Args:
        path: Names a YAML file or a shipped recipe.
        overrides: `section.key=value`, values written as in YAML, text as it stands.
        is_saved: The file is the `config.yaml` of a run; nobody is told which of its names are old.

    Returns:
        The recipe, or the first of its stages.

    Raises:
        UsageError: with one line for each mistake in the file and the overrides.
    """
    return load_stages(path, overrides, is_saved=is_saved)[0]


def load_stages(path: str | Path, overrides: Sequence[str] = (), *, is_saved: bool = False) -> list[Recipe]:
    """Read a recipe file whose training may come in stages, apply overrides, check everything.

    Below `stages:` a file may name stages, each with the sections and keys in which it differs from the rest of the
    file. Each is a run: the last has the name of the recipe, one before it that name, a hyphen and its own, and each
    starts from the best model of the one before it.

    Args:
        path: Names a YAML file or a shipped recipe.
        overrides: `section.key=value`, values written as in YAML but text as it stands, which hold in all stages; or
            `stages.<name>.section.key=value`.
        is_saved: See `load_recipe`.

    Returns:
        A recipe for each stage; one if the file names none.

    Raises:
        UsageError: with one line for each mistake in the file and the overrides.
    """
    path = find_recipe(path)
    mistakes: list[Mistake] = []
    values, places = _read_yaml(path, mistakes)
    values, overrides, renamed = with_new_names(values, places, overrides)
    if not is_saved:
        tell_renamed(renamed)
    _leave_out_other_decoders(values.get("decoder"), overrides)
    stages = values.pop("stages", None)
    if stages is None:
        for override in overrides:
            if override.startswith("stages."):
                found = f"{override!r}: {path} has no stages"
                mistakes.append(Mistake("", found, "write section.key=value", COMMAND_LINE))
            else:
                _apply_override(values, places, override, mistakes)
        return [_validate(values, places, str(path), mistakes)]
    recipes: list[Recipe] = []
    sound = check_stages(stages, places, mistakes)
    mistakes += overrides_of_no_stage(overrides, stages)
    for name, changes in sound.items():
        of_stage, places_of_stage = merge_stage(values, places, name, changes)
        for override in overrides:
            if not override.startswith("stages."):
                _apply_override(of_stage, places_of_stage, override, mistakes)
        for override in overrides:  # what is said of one stage counts more, wherever it stands
            if override.startswith(own := f"stages.{name}."):
                place = f"{COMMAND_LINE}: stages.{name}"
                _apply_override(of_stage, places_of_stage, override.removeprefix(own), mistakes, place)
        try:
            recipes.append(_validate(of_stage, places_of_stage, str(path), []))
        except UsageError as error:
            mistakes += error.mistakes
    if not mistakes:
        mistakes += differences_between_stages(recipes, list(stages), places)
    if mistakes:
        raise UsageError(*dict.fromkeys(mistakes))
    chained = chain_stages(recipes, list(stages))
    # The first stage must not start from what a later one is about to write either.
    beginnings = [chained[0].model_copy(update={"run": recipe.run}) for recipe in chained[1:]]
    if mistakes := [
        mistake.at("stages") for recipe in [*chained, *beginnings] for mistake in start_in_own_folder(recipe)
    ]:
        raise UsageError(*mistakes)
    return chained


def recipe_from_dict(values: Mapping[str, Any], origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check values that are not from a recipe file.

    Args:
        values: Give each key a value, by section.
        origin: Where they come from, for messages.
        overrides: `section.key=value`, values written as in YAML, text as it stands.

    Raises:
        UsageError: with one line for each mistake.
    """
    mistakes: list[Mistake] = []
    places: Places = {}
    changed, overrides, renamed = with_new_names(copy.deepcopy(dict(values)), places, overrides, origin)
    tell_renamed(renamed)
    for override in overrides:
        _apply_override(changed, places, override, mistakes)
    return _validate(changed, places, origin, mistakes)


def _read_yaml(path: Path, mistakes: list[Mistake]) -> tuple[dict[str, Any], Places]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder; --config takes a YAML file") from None
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        raise UsageError(f"{path}: {error.strerror}; --config takes a YAML file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8; save the recipe as UTF-8") from None
    try:
        root = yaml.compose(text, Loader=_RecipeLoader)
        if root is not None:
            _refuse_anchors(root, path)
        values = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise UsageError(f"{path}{line}: not YAML: {problem}") from None
    except _UNREADABLE_VALUE as error:
        raise UsageError(f"{path}: not YAML that a recipe needs: {type(error).__name__}: {error}") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is sections of keys, found {show_value(values)}")
    places: Places = {}
    assert root is not None
    _collect_places(root, (), path, places, mistakes)
    return values, places


def _refuse_anchors(root: yaml.Node, path: Path) -> None:
    """Refuse a node that stands in two places: a recipe needs no aliases, and aliases of aliases are a bomb."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            raise UsageError(f"{path}:{node.start_mark.line + 1}: recipes have no YAML aliases; write the value out")
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            stack.extend(child for pair in node.value for child in pair)
        elif isinstance(node, yaml.SequenceNode):
            stack.extend(node.value)


def _collect_places(
    node: yaml.Node, above: tuple[str, ...], path: Path, places: Places, mistakes: list[Mistake]
) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = (*above, str(key_node.value))
        place = f"{path}:{key_node.start_mark.line + 1}"
        if key in places:
            mistakes.append(Mistake(".".join(key), f"given twice, first at {places[key]}", "keep one", place))
        places[key] = place
        _collect_places(value_node, key, path, places, mistakes)


def _apply_override(
    values: dict[str, Any], places: Places, override: str, mistakes: list[Mistake], place: str = COMMAND_LINE
) -> None:
    key, equals, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or len(parts) != 2 or not all(parts):
        mistakes.append(Mistake("", f"{override!r} is not an override", "write section.key=value", place))
        return
    section = values.setdefault(parts[0], {})
    if section is None:
        section = values[parts[0]] = {}
    if isinstance(section, dict):
        section[parts[1]] = _read_value(text, for_text=_takes_text(parts[0], parts[1]))
        places[parts] = place
        places.setdefault(parts[:1], place)


def _leave_out_other_decoders(decoder: Any, overrides: Sequence[str]) -> None:
    """Drop the keys that a file sets for another decoder than the one that the command line chooses, with a line.

    Args:
        decoder: The section as the file has it; changed in place.
        overrides: The command line's.
    """
    keys_and_values = (override.partition("=")[::2] for override in overrides)
    named = [name.strip() for key, name in keys_and_values if key.strip() == "decoder.name"]
    chosen = DECODER_SECTIONS.get(named[-1]) if named else None
    if chosen is None or not isinstance(decoder, dict):
        return  # nothing to choose, or a mistake that is told elsewhere
    known = {key for section in DECODER_SECTIONS.values() for key in section.model_fields}
    foreign = [key for key in decoder if key in known - chosen.model_fields.keys()]
    for key in foreign:
        del decoder[key]
    if foreign:
        dropped = ", ".join(f"decoder.{key}" for key in foreign)
        say_once(f"decoder.name={named[-1]} has no {dropped}; the values of the recipe are left out")


def _read_value(text: str, *, for_text: bool) -> Any:
    """Return the value of an override, in which a key that takes text needs no quotes: the shell has taken them off."""
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, *_UNREADABLE_VALUE):
        return text
    is_quoted = isinstance(value, str) and text[:1] in ("'", '"') and text[-1:] == text[:1]
    return text if for_text and not is_quoted and text.strip() not in _NULLS else value


def _takes_text(section: str, name: str) -> bool:
    classes = section_classes(section) if section in Recipe.model_fields else ()
    types = [keys_of(one)[name].annotation for one in classes if name in keys_of(one)]
    choices = {choice for annotation in types for choice in get_args(annotation) or (annotation,)}
    return bool(types) and {getattr(choice, "__origin__", choice) for choice in choices} <= {str, NoneType}


def _validate(values: Mapping[str, Any], places: Places, origin: str, mistakes: list[Mistake]) -> Recipe:
    # A section header with nothing below it is an empty section, not a null.
    values = {key: {} if value is None and key in Recipe.model_fields else value for key, value in values.items()}
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        mistakes += [_explain(details, values, places, origin) for details in error.errors(include_url=False)]
        wrong = {tuple(map(str, details["loc"]))[:2] for details in error.errors(include_url=False)}
        mistakes += [_with_place(mistake, places, origin) for mistake in _mistakes_of_the_rest(values, wrong)]
    except UsageError as error:
        mistakes += [_with_place(mistake, places, origin) for mistake in error.mistakes]
    if mistakes:
        raise UsageError(*mistakes)
    assert recipe is not None
    return recipe


def _mistakes_of_the_rest(values: Mapping[str, Any], wrong: Set[tuple[str, ...]]) -> list[Mistake]:
    """Return what keys get wrong together although others are wrong alone, so that a user sees all at once."""
    rest = {name: dict(section) for name, section in values.items() if isinstance(section, dict)}
    for section, *key in wrong:
        if key:
            rest.get(section, {}).pop(key[0], None)
        else:
            rest.pop(section, None)
    try:
        Recipe.model_validate(rest)
    except UsageError as error:
        return [mistake for mistake in error.mistakes if _path(mistake) not in wrong]
    except ValidationError:
        pass
    return []


def _path(mistake: Mistake) -> tuple[str, ...]:
    return tuple(mistake.key.split("."))


def _with_place(mistake: Mistake, places: Places, origin: str) -> Mistake:
    return mistake.at(places.get(_path(mistake), origin))


def _explain(details: ErrorDetails, values: Mapping[str, Any], places: Places, origin: str) -> Mistake:
    key = tuple(str(part) for part in details["loc"])[:2]
    place = places.get(key) or places.get(key[:1]) or origin
    text, hint = wrong_value(details), ""
    if details["type"] == "extra_forbidden":
        text, hint = _unknown_key(key, values)
    elif details["type"] == "model_type":
        text = f"expected a section of keys, found {show_value(details['input'])}"
    return Mistake(".".join(key), text, hint, place)


def _unknown_key(key: tuple[str, ...], values: Mapping[str, Any]) -> tuple[str, str]:
    """Return what is wrong with an unknown key, and the known key most like it or all known keys."""
    if len(key) == 1:
        return "unknown key", _suggest(nearest_name(key[0], Recipe.model_fields), Recipe.model_fields)
    section, name = key
    if new := RENAMED_KEYS.get((section, name)):
        return f"is the old name of {section}.{new}, which is given too", "keep one"
    chosen = section_class(section, values[section])
    known = keys_of(chosen)
    if owners := [one for one in section_classes(section) if name in keys_of(one)]:
        others = " and ".join(one.model_fields["name"].default for one in owners)
        own = known["name"].default
        return f"is a key of {section}.name={others}, not of {own}", f"change {section}.name, or drop this key"
    near = nearest_name(name, known)
    elsewhere = sorted(f"{other}.{own}" for other, own in recipe_keys() if own == name)
    return "unknown key", _suggest(f"{section}.{near}" if near else next(iter(elsewhere), None), known)


def _suggest(closest: str | None, known: Iterable[str]) -> str:
    return f"did you mean '{closest}'?" if closest else f"known: {', '.join(sorted(known))}"
