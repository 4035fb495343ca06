"""Every key of a recipe with its type, default and meaning, from the declarations: what `capdist keys` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from rich.console import Console
from rich.text import Text

from capdist.errors import UsageError, nearest
from capdist.recipe.rules import Section
from capdist.recipe.sections import Recipe, section_classes

WIDEST = 100
"""Columns that a line fills at most, on a terminal however wide."""

_TYPES = {"string": "text", "boolean": "true or false", "integer": "integer", "number": "number", "null": "null"}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


@dataclass(frozen=True)
class KeyText:
    """One key of a recipe, in words.

    Attributes:
        name: `section.key`.
        type: Lists its choices, or names its type and bounds.
        default: Is spelt as in a recipe file.
        meaning: What it does.
    """

    name: str
    type: str
    default: str
    meaning: str


def recipe_sections() -> Iterator[tuple[str, type[Section]]]:
    """Yield name and class of each section; that of the decoder once for each decoder."""
    for name in Recipe.model_fields:
        for section in section_classes(name):
            yield name, section


def keys_of(name: str, section: type[Section]) -> Iterator[KeyText]:
    """Yield the keys of a section.

    Args:
        name: Names the section, such as `data`.
        section: The class that declares the keys; it may be one of several for a name.
    """
    for key, schema in section.model_json_schema()["properties"].items():
        meaning = " ".join(schema["description"].split())
        yield KeyText(f"{name}.{key}", _type(schema), _spell(schema.get("default")), meaning)


def print_keys(name: str | None = None) -> None:
    """Print the keys of all sections, or of one, in plain text, on a terminal with colour.

    Args:
        name: Names a section; None prints all.

    Raises:
        UsageError: if there is no such section.
    """
    sections = [(found, section) for found, section in recipe_sections() if name in (None, found)]
    if not sections:
        raise UsageError(f"keys: {name!r} is no section of a recipe{nearest(str(name), Recipe.model_fields)}")
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    width = min(console.width, WIDEST)
    for found, section in sections:
        headline = f"{found}: {' '.join((section.__doc__ or '').split())}"
        console.print(Text(fill(headline, width), "bold underline"))
        for key in keys_of(found, section):
            console.print()
            console.print(_show(key, width))
        console.print()


def _show(key: KeyText, width: int) -> Text:
    head = Text.assemble((key.name, "bold"), "  ", (f"[default: {key.default}]", "green"))
    kind, meaning = (
        fill(text, width, initial_indent="    ", subsequent_indent="    ") for text in (key.type, key.meaning)
    )
    return Text("\n").join([head, Text(kind, "cyan"), Text(meaning)])


def _type(schema: dict[str, Any]) -> str:
    """Return in words what a JSON schema allows."""
    if "anyOf" in schema:
        return ", or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        *others, last = schema.get("enum", [schema.get("const")])
        return f"{', '.join(others)} or {last}" if others else str(last)
    if schema["type"] == "array":
        return f"list of {_type(schema['items'])}"
    kind = _TYPES[schema["type"]]
    if "minimum" in schema and "maximum" in schema:
        return f"{kind} from {schema['minimum']} to {schema['maximum']}"
    bounds = [f"{sign} {schema[bound]}" for bound, sign in _BOUNDS.items() if bound in schema]
    return f"{kind} {' and '.join(bounds)}".rstrip()


def _spell(value: Any) -> str:
    """Return a default as a recipe file spells it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_spell, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
