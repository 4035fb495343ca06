"""The `capdist` command: each subcommand a thin call into a module."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capdist.arguments import HELP_OPTIONS, Config, Debug, Overrides, Quiet, complete_recipe, run_command
from capdist.console import set_up_output
from capdist.errors import DataError, Mistake, UsageError, run_program
from capdist.recipe.search import SearchSettings
from capdist.train_options import TrainCommand, TrainOptions, train_command
from capdist.version import __version__

if TYPE_CHECKING:
    from capdist.inference.captioner import Captioner
    from capdist.inference.writing import Caption

app = typer.Typer(
    help="Train, evaluate and use image captioners.",
    context_settings=HELP_OPTIONS,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="model folder, or model id of the Hugging Face Hub")]
Others = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="MODEL", help="one more model, to write each caption together; may be repeated"),
]
ImageSize = Annotated[
    int | None,
    typer.Option(min=32, max=2048, help="squash photos to so many pixels; default: as the model says"),
]

Search = dict[str, Any]
"""Search settings by name, those that the command line gives; see `takes_search`."""

PHOTOS_AT_ONCE = 32
"""Photos that `caption` captions before it prints."""

_ARGUMENTS = "capdist.arguments"


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"capdist {__version__}")
        raise typer.Exit


def takes_search(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each search setting, as `SearchSettings` declares it, in place of `search`."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        search = {name: arguments.pop(name) for name in SearchSettings.model_fields}
        command(search={name: value for name, value in search.items() if value is not None}, **arguments)

    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += _search_options() if parameter.name == "search" else [parameter]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _search_options() -> Iterator[inspect.Parameter]:
    """Yield the option of each search setting: its type, bounds and meaning."""
    for name, schema in SearchSettings.model_json_schema()["properties"].items():
        number, *null = schema.get("anyOf", [schema])
        none = " Here 0 means null." if null else ""
        option = typer.Option(
            min=number.get("minimum", number.get("exclusiveMinimum")),
            max=number.get("maximum"),
            help=f"{' '.join(schema['description'].split())}{none} Default: as the model was validated.",
        )
        kind: Any = int | None if number["type"] == "integer" else float | None
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


class LaunchCommand(TrainCommand):
    """`capdist train`: options of `accelerate launch` are taken off before the others are read."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep all arguments for the launcher, and read those of training."""
        from capdist.commands.train import split_arguments

        ctx.meta[_ARGUMENTS] = [*args]
        with suppress(UsageError) if ctx.resilient_parsing else nullcontext():  # a shell completes half a line
            _, args = split_arguments(args)
        return super().parse_args(ctx, args)


def _launch(context: typer.Context, options: TrainOptions) -> None:
    from capdist.commands.train import launch_training

    raise typer.Exit(launch_training(context.meta[_ARGUMENTS]))


app.command("train", cls=LaunchCommand)(train_command(_launch))


@app.command()
@takes_search
def evaluate(
    model: Model,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="data.X_column=NAME", help="names of columns, as in a recipe")
    ] = None,
    *,
    source: Annotated[str, typer.Option(help="scenes, flickr8k, karpathy, hub or folder")],
    path: Annotated[str | None, typer.Option(help="folder or file of the source, or a data set id")] = None,
    others: Others = None,
    split: Annotated[str, typer.Option(help="train, validation (dev), dev-choose, dev-report or test")] = "test",
    search: Search,
    image_size: ImageSize = None,
    limit: Annotated[int | None, typer.Option(min=1, help="first N images of the split")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images captioned at once")] = 64,
    num_workers: Annotated[int, typer.Option(min=0, help="loader processes")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file with metrics, settings and captions")] = None,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Caption a split, free-running, and score it. Also under `accelerate launch -m capdist.cli evaluate …`."""
    from capdist.commands.evaluate import evaluate_folder, evaluation_data

    set_up_output(quiet=quiet)
    evaluate_folder(
        [model, *(others or ())],
        evaluation_data(source, path, limit=limit, num_workers=num_workers, overrides=overrides or ()),
        split,
        search=search,
        image_size=image_size,
        batch_size=batch_size,
        output=output,
    )


@app.command()
@takes_search
def caption(
    model: Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="photos, or folders of photos")],
    *,
    others: Others = None,
    search: Search,
    image_size: ImageSize = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
    attention: Annotated[Path | None, typer.Option(metavar="FOLDER", help="save what each word looked at")] = None,
    debug: Debug = False,
) -> None:
    """Caption photos. Photos that cannot be read are listed at the end, with exit code 3."""
    from capdist.inference.captioner import Captioner, find_photos

    photos = find_photos(images)
    captioner = Captioner.from_pretrained([model, *(others or ())], image_size=image_size)
    if attention is not None:
        attention.mkdir(parents=True, exist_ok=True)
    how = {**search, "return_attention": attention is not None}
    unread: list[Mistake] = []
    for start in range(0, len(photos), PHOTOS_AT_ONCE):
        for photo, result in _caption_readable(captioner, photos[start : start + PHOTOS_AT_ONCE], how, unread):
            _tell_caption(photo, result, as_json, attention)
    if unread:
        raise DataError(*unread)


def _caption_readable(
    captioner: Captioner, photos: Sequence[Path], how: dict[str, Any], unread: list[Mistake]
) -> list[tuple[Path, Caption]]:
    """Caption the photos that can be read; what is wrong with the others is added to `unread`."""
    try:
        return list(zip(photos, captioner.caption(photos, batch_size=len(photos), **how), strict=True))
    except DataError as error:
        if len(photos) == 1:
            unread += error.mistakes
            return []
    return [pair for photo in photos for pair in _caption_readable(captioner, [photo], how, unread)]


def _tell_caption(photo: Path, result: Caption, as_json: bool, attention: Path | None) -> None:
    from capdist.data.images import open_photo
    from capdist.inference.pictures import save_attention

    line = {"image": str(photo), "caption": result.text, "log_probability": result.log_probability}
    typer.echo(json.dumps(line, ensure_ascii=False) if as_json else f"{photo}: {result.text}")  # flushes
    if attention is not None and result.attention is not None:
        picture = open_photo({"path": str(photo), "bytes": None})
        save_attention(picture, result.words, result.attention, _new_file(attention, f"{photo.stem}_attention"))


def _new_file(folder: Path, name: str) -> Path:
    """Return a PNG path that nothing has yet: two photos may share a name, and nothing of the user is overwritten."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(path for path in (folder / f"{n}.png" for n in names) if not path.exists())


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Read every caption and photo of a recipe; list every problem. The exit code is 3 if there is one."""
    from capdist.commands.check import check_recipe
    from capdist.recipe.reading import load_stages
    from capdist.training.start import check_networks

    set_up_output(quiet=quiet)
    stages = load_stages(config, overrides or ())
    check_networks(stages)
    check_recipe(stages[0])


@app.command()
def features(
    config: Config,
    overrides: Overrides = None,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Encode every photo of a recipe into the cache. Also under `accelerate launch -m capdist.cli features …`."""
    from capdist.distributed.process import spin_briefly
    from capdist.recipe.reading import load_recipe

    spin_briefly()
    from capdist.commands.features import fill_cache

    set_up_output(quiet=quiet)
    fill_cache(load_recipe(config, overrides or ()))


@app.command()
def keys(
    section: Annotated[str | None, typer.Argument(metavar="SECTION", help="such as training; none = all")] = None,
    debug: Debug = False,
) -> None:
    """List every recipe key with type, default and meaning."""
    from capdist.recipe.keys import print_keys

    print_keys(section)


@app.command()
def benchmark(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME…] [section.key=value…]", help="train-step, encode, caption, input, epoch; none = all"
        ),
    ] = None,
    *,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="sizes; default: ResNet-50, 49 cells, 512 hidden",
            autocompletion=complete_recipe,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="timed calls; the median counts; capdist's epoch runs once")] = 5,
    images: Annotated[
        int | None, typer.Option(min=1, help="photos or images of each but train-step; whole batches are fairest")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="trained model for caption, on data.path; default: random weights"),
    ] = None,
    textbook: Annotated[bool, typer.Option(help="race the plain implementation")] = True,
    textbook_images: Annotated[
        int | None, typer.Option(min=1, help="images that it captions; default: a twentieth of the images")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="traces of train-step and caption, and where the time goes")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write all figures")] = None,
    debug: Debug = False,
) -> None:
    """Measure speed beside a plain implementation. Also beside what this machine can do."""
    from capdist.distributed.process import spin_briefly

    spin_briefly()
    from capdist.commands.benchmark import load_sizes, run_benchmarks

    names = [argument for argument in arguments or () if "=" not in argument]
    run_benchmarks(
        names,
        load_sizes(config, [argument for argument in arguments or () if "=" in argument]),
        repeats=repeats,
        images=images,
        model=model,
        with_textbook=textbook,
        textbook_images=textbook_images,
        profile=profile,
        output=as_json,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the program's code.

    Args:
        argv: Arguments; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.exit(run_program(lambda: _run(arguments), debug="--debug" in arguments))


def _run(arguments: Sequence[str]) -> None:
    if code := run_command(app, arguments, "capdist"):
        sys.exit(code)


if __name__ == "__main__":
    main()
