"""Arguments that several commands take, how they complete in a shell, and how a command line is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Annotated, Any

import typer

from capdist.errors import UsageError

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
"""Context settings of every command."""


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """Return the shipped recipes whose names begin so, each with the beginning of its first sentence."""
    from capdist.recipe.names import first_sentence, shipped_recipes

    return _matching({name: first_sentence(path) for name, path in shipped_recipes().items()}, incomplete)


def complete_override(incomplete: str) -> list[tuple[str, str]]:
    """Return the recipe keys that begin so, as `section.key=`; also behind `stages.NAME.`."""
    from capdist.recipe.keys import keys_of, recipe_sections

    stage = re.match(r"stages\.[^.]+\.|", incomplete)
    prefix = stage[0] if stage else ""
    keys = (key for name, section in recipe_sections() for key in keys_of(name, section))
    return _matching({f"{prefix}{key.name}=": key.meaning for key in keys}, incomplete)


def _matching(known: Mapping[str, str], incomplete: str) -> list[tuple[str, str]]:
    # Shells show the help beside the word; quotes and line breaks in it confuse the script of zsh.
    return [
        (word, shorten(text.replace('"', ""), 60, placeholder="…"))
        for word, text in known.items()
        if word.startswith(incomplete)
    ]


Config = Annotated[
    str,
    typer.Option(metavar="RECIPE", help="YAML file, or name of a shipped recipe", autocompletion=complete_recipe),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="change keys of the recipe", autocompletion=complete_override),
]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks of expected errors")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print only warnings and errors")]


def run_command(app: typer.Typer, arguments: Sequence[str], name: str) -> Any:
    """Run what a command line asks for.

    Args:
        app: Holds the commands.
        arguments: The command line, without the name of the program; it is parsed here.
        name: What help and errors call the program.

    Returns:
        What the command returns, or the exit code with which it ended early: 0 after `--help`.

    Raises:
        UsageError: if the arguments make no sense.
    """
    # The click that typer uses is a dependency of it in some versions and a part of it in others.
    click_error: Any = typer.BadParameter.__base__
    try:
        return app(list(arguments), standalone_mode=False, prog_name=name)
    except click_error as error:
        command = getattr(getattr(error, "ctx", None), "command_path", name)
        raise UsageError(f"{error.format_message()} (see `{command} --help`)") from None
    except typer.Abort:
        raise KeyboardInterrupt from None
