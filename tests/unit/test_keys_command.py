"""`capdist keys`: all keys, with types, defaults and meanings that are those of the program."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from capdist import cli
from capdist.errors import UsageError
from capdist.recipe.decoders import DECODER_SECTIONS
from capdist.recipe.keys import KeyText, keys_of, recipe_sections
from capdist.recipe.reading import recipe_from_dict
from capdist.recipe.sections import recipe_keys
from tests.processes import REPOSITORY, run, run_on_terminal

KEYS: list[KeyText] = [key for name, section in recipe_sections() for key in keys_of(name, section)]


def _choice(key: KeyText) -> list[str]:
    """Return the override that chooses the section of a key, if its section must be chosen."""
    sections = [section for name, section in recipe_sections() if key in keys_of(name, section)]
    return [f"decoder.name={sections[0].model_fields['name'].default}"] if key.name.startswith("decoder.") else []


def _refused(key: KeyText, value: str) -> bool:
    """Return whether a recipe refuses the value of a key, without looking at what it says of other keys."""
    try:
        recipe_from_dict({}, "test", [*_choice(key), f"{key.name}={value}"])
    except UsageError as error:
        return any(f" {key.name}: must be " in str(mistake) for mistake in error.mistakes)
    return False


def test_every_key_is_there() -> None:
    assert {key.name for key in KEYS} == {f"{section}.{key}" for section, key in recipe_keys()}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_the_default_is_what_a_recipe_says_for_it(key: KeyText) -> None:
    assert recipe_from_dict({}, "test", [*_choice(key), f"{key.name}={key.default}"]) == recipe_from_dict(
        {}, "test", _choice(key)
    )


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_what_the_type_says_is_what_a_recipe_takes(key: KeyText) -> None:
    assert _refused(key, "null") != key.type.endswith("null")
    kind = key.type.removesuffix(", or null")
    if kind == "true or false":
        taken, refused = ["true", "false"], ["maybe", "1"]
    elif found := re.fullmatch(r"(integer|number) from (\d+) to (\d+)", kind):
        least, most = int(found[2]), int(found[3])
        taken, refused = [str(least), str(most)], [str(least - 1), str(most + 1), "text"]
    elif kind.startswith(("integer", "number")):
        bounds = re.findall(r"(<|>|<=|>=) (-?[\d.]+)", kind)
        assert re.sub(r"( and)? (<|>|<=|>=) (-?[\d.]+)", "", kind) in ("integer", "number")
        taken = [value for sign, value in bounds if "=" in sign]
        refused = ["text"] + [value for sign, value in bounds if "=" not in sign]
        refused += [str(float(value) + (1 if sign[0] == "<" else -1)) for sign, value in bounds]
    elif kind == "text":
        taken, refused = ["words"], []
    else:
        choices = re.split(", | or ", kind.removeprefix("list of "))
        is_list = kind.startswith("list of ")
        taken = [f"[{choice}]" if is_list else choice for choice in choices]
        refused = ["[no such]" if is_list else "no such"]
    assert [value for value in taken if _refused(key, value)] == []
    assert [value for value in refused if not _refused(key, value)] == []


def test_meanings_are_those_beside_the_declarations() -> None:
    files = (REPOSITORY / "capdist" / "recipe").glob("*.py")
    written = {
        " ".join(str(node.value.value).split())
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    assert all(key.meaning and key.meaning in written for key in KEYS)


def test_the_section_of_the_decoder_comes_once_for_each_decoder() -> None:
    assert [section for name, section in recipe_sections() if name == "decoder"] == [*DECODER_SECTIONS.values()]


# --- the command ----------------------------------------------------------------------------------------------------


def test_off_a_terminal_it_is_plain_text_of_80_columns() -> None:
    result = run(["-m", "capdist.cli", "keys"], COLUMNS="80")
    assert result.returncode == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line != line.rstrip() or "\x1b" in line]
    assert [line.split("  [default: ") for line in lines if "  [default: " in line] == [
        [key.name, f"{key.default}]"] for key in KEYS
    ]
    assert " ".join(KEYS[-1].meaning.split()) in " ".join(result.stdout.split())


def test_one_section() -> None:
    shown = run(["-m", "capdist.cli", "keys", "training"]).stdout
    assert {line.split()[0] for line in shown.splitlines() if "[default: " in line} == {
        key.name for key in KEYS if key.name.startswith("training.")
    }
    assert shown.startswith("training: ")


def test_on_a_terminal_there_is_colour_unless_it_is_not_wanted() -> None:
    command = ["-m", "capdist.cli", "keys", "training"]
    coloured = r"\x1b\[[\d;]*3\dm"
    assert re.search(coloured, run_on_terminal(command).output)
    assert not re.search(coloured, run_on_terminal(command, NO_COLOR="1").output)


@pytest.mark.parametrize(("name", "hint"), [("trainin", "did you mean 'training'?"), ("zzz", "known: checkpoint, ")])
def test_an_unknown_section_is_one_line(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["keys", name])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"capdist: error: keys: '{name}' is no section of a recipe; {hint}")


def test_keys_are_known_without_torch() -> None:
    code = "import sys; from capdist.recipe.keys import print_keys; print_keys(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, capture_output=True)
