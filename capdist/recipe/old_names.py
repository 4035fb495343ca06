"""Keys that older versions called otherwise: recipes, runs and model folders of that time are still read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capdist.recipe.names import say_once
from capdist.recipe.stages import COMMAND_LINE, Places

RENAMED_KEYS = {("encoder", "stage"): "last_block", ("training", "stage"): "objective"}
"""Section and old name of each key that older versions called otherwise, and what it is called today."""


def rename_old_keys(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """Return a recipe with the names that its keys have today. Everything that reads a recipe calls this.

    Where the new name is given too, the old one stays, and is refused as an unknown key.

    Args:
        recipe: Values by section and key, checked by nobody.

    Returns:
        The recipe, and section, old and new name of each key that was renamed.
    """
    renamed = [
        (section, old, new)
        for (section, old), new in RENAMED_KEYS.items()
        if isinstance(keys := recipe.get(section), Mapping) and old in keys and new not in keys
    ]
    values = dict(recipe)
    for section, old, new in renamed:
        values[section] = {new if key == old else key: value for key, value in values[section].items()}
    return values, renamed


Renamed = dict[tuple[str, str, str], str]
"""Section, old and new name of keys that were given by their old names, and where each was first."""


def with_new_names(
    values: dict[str, Any], places: Places, overrides: Sequence[str], origin: str = ""
) -> tuple[dict[str, Any], list[str], Renamed]:
    """Give the keys of a recipe, of its stages and of overrides the names that they have today.

    Args:
        values: The whole recipe by section and key, with its `stages`; it is not changed.
        places: Where its keys are; renamed ones are added.
        overrides: `section.key=value` or `stages.<name>.section.key=value`.
        origin: Place of keys that `places` lacks.
    """
    renamed: Renamed = {}

    def rename(of: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[str, Any]:
        new_values, found = rename_old_keys(of)
        for section, old, new in found:
            place = places.get((*above, section, old), origin)
            places[*above, section, new] = place
            renamed.setdefault((section, old, new), place)
        return new_values

    values = rename(values)
    if isinstance(stages := values.get("stages"), dict):
        values["stages"] = {
            name: rename(changes, ("stages", str(name))) if isinstance(changes, dict) else changes
            for name, changes in stages.items()
        }
    keys = [override.partition("=")[0].strip() for override in overrides]
    return values, [_rename_override(override, keys, renamed) for override in overrides], renamed


def _rename_override(override: str, keys: Sequence[str], renamed: Renamed) -> str:
    """Give the key of an override its name of today, unless one of the other keys is of that name already."""
    key, equals, text = override.partition("=")
    above, _, name = key.strip().rpartition(".")
    siblings = {other.removeprefix(f"{above}."): None for other in keys if other.startswith(f"{above}.")}
    for section, old, new in rename_old_keys({above.rpartition(".")[2]: siblings})[1]:
        if old == name:
            renamed.setdefault((section, old, new), COMMAND_LINE)
            return f"{above}.{new}{equals}{text}"
    return override


def tell_renamed(renamed: Renamed) -> None:
    """Tell the user the new name of each key that was renamed."""
    for (section, old, new), place in renamed.items():
        say_once(f"{place}: {section}.{old} is now called {section}.{new}")
