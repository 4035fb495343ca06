"""What `capdist check` does: read a recipe's captions and photos once, and list all problems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from capdist.console import results
from capdist.data.checks import Report, check_data
from capdist.data.images import open_photo
from capdist.data.splits import read_source
from capdist.errors import DataError
from capdist.progress import Progress
from capdist.recipe.sections import Recipe

if TYPE_CHECKING:
    from rich.table import Table


def check_recipe(recipe: Recipe) -> Report:
    """Check the data of a recipe and print statistics, warnings and problems.

    Args:
        recipe: Only its `data` section matters.

    Returns:
        The report, if there is no problem.

    Raises:
        DataError: with one line for each problem.
    """
    loaded = read_source(recipe.data)
    with Progress("check", sum(map(len, loaded.splits.values())), "photo") as bar:

        def advance(done: int, total: int) -> None:
            bar.update(done - bar.done)

        report = check_data(loaded, decode=_decode, progress=advance)
    results().print(_table(report))
    for warning in report.warnings:
        results(always=True).print(f"warning: {warning}", soft_wrap=True)
    if not report.is_clean:
        raise DataError(*report.problems)
    results().print("every caption and every photo of these splits can be read")
    return report


def _decode(image: dict[str, Any]) -> None:
    open_photo(image).load()


def _table(report: Report) -> Table:
    from rich.table import Table

    table = Table()
    columns = list(next(iter(report.statistics.values()), {}))
    for column in ("split", *columns):
        table.add_column(column.replace("_", " "), justify="left" if column == "split" else "right")
    for split, statistics in report.statistics.items():
        table.add_row(split, *(f"{statistics[column]:,.10g}" for column in columns))
    return table
