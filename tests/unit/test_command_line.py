"""The `capdist` command as one reads and types it: help, names of options, completion, mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from capdist import cli
from capdist.arguments import complete_override, complete_recipe
from capdist.commands import train as launcher
from capdist.recipe.sections import recipe_keys
from capdist.train_options import TrainOptions, parse_arguments
from tests.processes import REPOSITORY, TRAIN, run

COMMANDS = ["train", "evaluate", "caption", "check", "features", "keys", "benchmark"]


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must succeed without a word on standard error."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert (ended.value.code or 0, printed.err) == (0, "")
    return printed.out


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


# --- help -----------------------------------------------------------------------------------------------------------


def test_without_arguments_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output_of(capsys)
    assert shown.startswith("Usage: capdist [OPTIONS] COMMAND")
    assert shown == output_of(capsys, "--help") == output_of(capsys, "-h")


def test_summaries_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    listed = output_of(capsys, "--help").partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    assert all(re.fullmatch(r"  \w+ +[A-Z].*[^.]\.", line) for line in listed), listed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_plain_help_of_80_columns(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output_of(capsys, command, "-h")
    assert shown == output_of(capsys, command, "--help")
    assert shown.startswith(f"Usage: capdist {command} ")
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search("[\x1b╭│]", shown)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_package_is_a_program(arguments: list[str]) -> None:
    result = run(["-m", "capdist", *arguments])
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: capdist [OPTIONS] COMMAND")


def test_help_of_training_says_what_there_is_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(output_of(capsys, "train", "--help").split())
    options, _, recipes = shown.partition(" Recipes: ")
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        begin = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").partition(". ")[0]
        assert f"{path.stem} {begin}" in recipes
    assert "`capdist keys` lists all keys" in options
    assert "options of `accelerate launch`, such as --num_processes 2" in options
    assert "[default: scenes]" in options


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], TrainOptions("scenes")),
        (["run.seed=1", "--config", "a.yaml", "run.name=x"], TrainOptions("a.yaml", ("run.seed=1", "run.name=x"))),
        (["--resume", "a.b=-1", "--debug", "--config=x"], TrainOptions("x", ("a.b=-1",), resume=True, debug=True)),
    ],
)
def test_what_a_training_process_reads(arguments: list[str], options: TrainOptions) -> None:
    assert parse_arguments(arguments) == options


@pytest.mark.parametrize("place", [[], ["--num_processes", "2"], ["--num-processes=2", "--cpu"], ["-t", "3"]])
def test_all_arguments_reach_the_launcher_in_their_order(place: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(launcher, "launch_training", lambda arguments: started.append(arguments) or 7)
    arguments = ["run.seed=1", *place, "--resume", "--config", "flickr8k", "--debug", "stages.look.training.epochs=2"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *arguments])
    assert ended.value.code == 7
    assert started == [arguments]


@pytest.mark.parametrize("start", [["train"], None], ids=["capdist train", "train.py"])
def test_an_option_that_neither_knows_is_refused(start: list[str] | None) -> None:
    program = [str(TRAIN)] if start is None else ["-m", "capdist", *start]
    result = run([*program, "--resum", "--config", "scenes"])
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("capdist: error: No such option: --resum")


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "found", "command"),
    [
        (["chek"], "No such command 'chek'. Did you mean 'check'?", "capdist"),
        (["check"], "Missing option '--config'", "capdist check"),
        (["check", "--confg", "x"], "No such option: --confg", "capdist check"),
        (["--vers"], "No such option: --vers", "capdist"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], found: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith(f"capdist: error: {found}")
    assert line.endswith(f" (see `{command} --help`)")


# --- completion -----------------------------------------------------------------------------------------------------

COMPLETE = """
program="$1"; shift
eval "$(_CAPDIST_COMPLETE=source_bash "$program")"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_capdist_completion "$program"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def complete(tmp_path: Path) -> Callable[..., set[str]]:
    """Return a function that returns what bash offers for the last of some words."""
    program = tmp_path / "capdist"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m capdist "$@"\n')
    program.chmod(0o755)

    def complete(*words: str) -> set[str]:
        command = ["bash", "-c", COMPLETE, "bash", str(program), "capdist", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
        assert done.stderr == ""
        return set(done.stdout.split())

    return complete


def test_the_shell_completes_commands_recipes_and_keys(complete: Callable[..., set[str]]) -> None:
    assert complete("ch") == {"check"}
    assert complete("check", "--con") == {"--config"}
    assert complete("train", "--num_processes", "2", "--cpu", "--re") == {"--resume"}
    assert complete("train", "--num_processes", "--re") == {"--resume"}, "an option without its value is no mistake yet"
    recipes = {path.stem for path in (REPOSITORY / "configs").glob("flickr8k*.yaml")}
    assert complete("check", "--config", "flick") == recipes
    keys = {f"training.{key}=" for section, key in recipe_keys() if section == "training" and key[0] == "w"}
    assert complete("check", "--config", "scenes", "training.w") == keys
    assert {"training.warmup_steps=", "training.weight_decay="} <= keys


def test_keys_of_a_stage_complete_too() -> None:
    assert [word for word, _ in complete_override("stages.look.data.batch")] == ["stages.look.data.batch_size="]
    assert [word for word, _ in complete_override("data.batch")] == ["data.batch_size="]
    assert complete_override("stages.") == []


def test_help_beside_a_word_is_short_and_without_quotes() -> None:
    for word, text in [*complete_recipe(""), *complete_override("")]:
        assert word
        assert 0 < len(text) <= 60
        assert '"' not in text
        assert "\n" not in text


def test_completion_loads_no_heavy_library() -> None:
    code = (
        "import sys; from capdist.arguments import complete_override, complete_recipe; "
        "complete_recipe(''), complete_override(''); "
        "heavy = {'torch', 'datasets', 'spacy', 'accelerate', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_completion_can_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output_of(capsys, "--help")
    assert "--install-completion" in shown
    assert "--show-completion" in shown
