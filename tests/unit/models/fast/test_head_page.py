"""The head page of the fast forms names tests and files that exist, and imports nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import capdist.models.fast

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[3]
PAGE = str(capdist.models.fast.__doc__)


def _find(file: str) -> Path:
    return REPOSITORY / file if "/" in file else HERE / file


def test_every_test_that_it_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) >= 6
    for file, test in named:
        assert f"def {test}(" in _find(file).read_text(encoding="utf-8"), f"{file} has no {test}"


def test_every_file_that_it_names_exists() -> None:
    for file in re.findall(r"`([\w/]+/[\w.]*)`", PAGE):
        assert (REPOSITORY / file).exists(), file


def test_it_describes_every_module_and_imports_none() -> None:
    page = Path(str(capdist.models.fast.__file__))
    modules = {path.stem for path in page.parent.glob("*.py")} - {"__init__"}
    assert modules == set(re.findall(r"^`(\w+)`:", PAGE, re.MULTILINE))
    assert len(ast.parse(page.read_text(encoding="utf-8")).body) == 1, "it has more than a docstring"
    for form in ("Plain form:", "Proof:", "Worth:"):
        assert PAGE.count(form) == len(modules)
