"""What `capdist train` and `capdist/train.py` take: one declaration, so that both take the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from capdist.arguments import HELP_OPTIONS, Config, Debug, Overrides, Quiet, run_command
from capdist.recipe.names import DEFAULT_RECIPE, first_sentence, shipped_recipes

Resume = Annotated[bool, typer.Option("--resume", help="continue from the newest whole checkpoint of the run")]


@dataclass(frozen=True)
class TrainOptions:
    """What a command line asks of training.

    Attributes:
        config: Names a recipe, or is its path.
        overrides: `section.key=value`.
        resume: Whether to continue the run that is there.
        debug: Whether expected errors show a traceback.
        quiet: Whether to say only warnings and errors.
    """

    config: str
    overrides: tuple[str, ...] = ()
    resume: bool = False
    debug: bool = False
    quiet: bool = False


class TrainCommand(TyperCommand):
    """A command whose help ends with the shipped recipes."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the names of the shipped recipes and what they begin with."""
        with formatter.section("Recipes"):
            formatter.write_dl([(name, first_sentence(path)) for name, path in shipped_recipes().items()])


def train_command(run: Callable[[typer.Context, TrainOptions], Any]) -> Callable[..., Any]:
    """Return a typer command with the options of training.

    Args:
        run: Takes its context and what was asked for; gives the command's value.
    """

    def command(
        context: typer.Context,
        overrides: Overrides = None,
        *,
        config: Config = DEFAULT_RECIPE,
        resume: Resume = False,
        debug: Debug = False,
        quiet: Quiet = False,
    ) -> Any:
        """Train a captioner from a recipe.

        section.key=value changes a key of the recipe, stages.NAME.section.key=value a key of one stage.
        `capdist keys` lists all keys.

        `capdist train` also takes the options of `accelerate launch`, such as --num_processes 2,
        --mixed_precision bf16 or --cpu. It waits for the training processes and hands on their exit code.
        """
        return run(context, TrainOptions(config, tuple(overrides or ()), resume, debug, quiet))

    return command


def parse_arguments(arguments: Sequence[str]) -> TrainOptions:
    """Read the arguments of `capdist/train.py`.

    Raises:
        UsageError: if they make no sense.
        SystemExit: once help is printed.
    """
    app = typer.Typer(add_completion=False, context_settings=HELP_OPTIONS, rich_markup_mode=None)
    app.command(cls=TrainCommand)(train_command(lambda context, options: options))
    options = run_command(app, arguments, "capdist train")
    if not isinstance(options, TrainOptions):
        raise SystemExit(options)
    return options
