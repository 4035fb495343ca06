"""The house rules that a program can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "capdist"
MODULES = sorted(PACKAGE.rglob("*.py"))
LAYERS = (
    ("errors", "files", "version", "console", "progress"), ("recipe",), ("text",), ("data",), ("models",),
    ("decoding",), ("metrics",), ("model_folder",), ("inference",), ("distributed",), ("features",), ("evaluation",),
    ("training",), ("benchmark",), ("arguments", "train_options"), ("train",), ("commands",), ("cli", "__main__"),
)  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Return imported modules, and whether each is imported as soon as the module is."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    typing_only = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for n in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        eager = id(node) not in inside | typing_only
        if isinstance(node, ast.Import):
            found += [(alias.name, eager) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, eager))
    return found


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else "capdist"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    for module, _ in imports(path):
        if module.startswith("capdist."):
            assert RANK[layer(module)] <= RANK[own], f"{path} imports {module}, which lies to the right of it"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [("accelerate", ("distributed", "features", "evaluation", "training")),
     ("wandb", ("training",)),
     ("torch", ("data", "models", "decoding", "model_folder", "inference", "distributed", "features", "evaluation",
      "training", "benchmark", "commands"))],
)  # fmt: skip
def test_libraries_stay_where_they_belong(library: str, allowed: tuple[str, ...]) -> None:
    for path in MODULES:
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        starts_the_launcher = path == PACKAGE / "commands" / "train.py"
        if any(module.split(".")[0] == library for module, _ in imports(path)) and not starts_the_launcher:
            assert own in allowed, f"{path} imports {library}"


def test_models_see_no_files_or_data_sets_and_decoding_no_model() -> None:
    for package, forbidden in (
        ("models", ("capdist.data", "datasets", "accelerate")),
        ("decoding", ("capdist.models", "capdist.data")),
        ("metrics", ("torch", "capdist.models")),
    ):
        for path in (PACKAGE / package).rglob("*.py"):
            for module, _ in imports(path):
                assert not module.startswith(forbidden), f"{path} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    heavy = ("spacy", "evaluate", "wandb", "datasets", "timm", "matplotlib", "pycocoevalcap")
    eager = {module.split(".")[0] for module, is_eager in imports(path) if is_eager}
    # These two stand around a class of the library, and are themselves imported where they are used.
    wrappers = (PACKAGE / "metrics" / "modules.py", PACKAGE / "metrics" / "meteor.py")
    assert not eager & set(heavy) or path in wrappers


def test_no_module_shadows_a_library_when_train_is_started_as_a_file() -> None:
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not {name for name in names if not name.startswith("_")} & taken


def test_train_is_short_and_functions_fit_a_screen() -> None:
    assert len((PACKAGE / "train.py").read_text().splitlines()) < 200
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 80, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_public_names_are_documented() -> None:
    missing = []

    def visit(node: ast.Module | ast.ClassDef, path: Path) -> None:
        if not ast.get_docstring(node):
            missing.append(f"{path} {getattr(node, 'name', '')}")
        for child in node.body:
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                visit(child, path)
            elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_") and not ast.get_docstring(child):
                missing.append(f"{path}:{child.lineno} {child.name}")

    for path in MODULES:
        visit(ast.parse(path.read_text()), path)
    assert not missing


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys; from capdist.cli import app; "
        "heavy = {'torch', 'datasets', 'spacy', 'evaluate', 'wandb', 'accelerate', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
