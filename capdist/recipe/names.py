"""Names of the shipped recipes: `--config flickr8k` means `configs/flickr8k.yaml`, in a checkout or once installed."""

from __future__ import annotations

import logging
import os
import re
from itertools import takewhile
from pathlib import Path

from capdist.errors import EXIT_FOLDER_VARIABLE, UsageError

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = "scenes"
"""What trains where no recipe is named."""


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipe files by name."""
    here = Path(__file__).resolve().parents[1]
    folders = (here / "configs", here.parent / "configs")  # an installed package, a checkout
    folder = next(folder for folder in folders if (folder / f"{DEFAULT_RECIPE}.yaml").exists())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe.

    A file of that name wins over a shipped recipe. `configs/flickr8k.yaml` where there is no such file is the shipped
    recipe, with a line that says so.

    Args:
        recipe: Names a shipped recipe, or is the path of a YAML file.

    Raises:
        UsageError: if there is neither; the line lists the shipped recipes.
    """
    path, shipped = Path(recipe), shipped_recipes()
    if os.path.exists(path) and not path.is_dir():
        return path
    if str(recipe) in shipped:
        return _from_here(shipped[str(recipe)])
    if path.stem in shipped and path == Path("configs", f"{path.stem}.yaml"):
        say_once(f"{path}: no such file here; taking the shipped recipe, {shipped[path.stem]}")
        return shipped[path.stem]
    try:
        path.stat()
    except FileNotFoundError:
        known = ", ".join(shipped)
        raise UsageError(f"{recipe}: no such recipe; name a YAML file or a shipped recipe: {known}") from None
    except OSError:
        pass  # whoever reads the file says why it cannot
    return path


def first_sentence(path: Path) -> str:
    """Return the first sentence of the comment with which a recipe file begins; empty without one."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("# "), lines)
    paragraph = " ".join(line.removeprefix("# ").strip() for line in comment)
    return re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]


def _from_here(path: Path) -> Path:
    """Return a path as a user in the current folder writes it, for messages that name it."""
    return Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path


def say_once(line: str) -> None:
    """Log a line in the first process of a launch, unless a parent `capdist train` has read the recipe before."""
    if EXIT_FOLDER_VARIABLE not in os.environ and os.environ.get("RANK", "0") == "0":
        logger.warning(line)
