"""Shipped recipes by name: which file a name means, which one wins, and what a wrong name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from capdist import cli
from capdist.errors import UsageError
from capdist.recipe.names import find_recipe, first_sentence, shipped_recipes
from capdist.recipe.reading import load_stages
from tests.processes import REPOSITORY

NAMES = sorted(path.stem for path in (REPOSITORY / "configs").iterdir())


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_recipe_file_of_the_repository_has_its_name() -> None:
    assert shipped_recipes() == {path.stem: path for path in (REPOSITORY / "configs").iterdir()}
    assert {"flickr8k", "scenes"} <= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_recipe_from_everywhere(elsewhere: Path, name: str) -> None:
    assert load_stages(name) == load_stages(REPOSITORY / "configs" / f"{name}.yaml")


def test_messages_name_the_file_as_seen_from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert str(find_recipe("scenes")) == "configs/scenes.yaml"


@pytest.mark.parametrize("name", ["scenes", "configs/scenes.yaml"])
def test_a_file_of_the_current_folder_wins(elsewhere: Path, name: str) -> None:
    (elsewhere / "configs").mkdir()
    (elsewhere / name).write_text("run: {name: mine}\n")
    assert load_stages(name)[0].run.name == "mine"


def test_a_folder_of_that_name_does_not(elsewhere: Path) -> None:
    (elsewhere / "flickr8k").mkdir()
    assert load_stages("flickr8k")[-1].run.name == "flickr8k"


def test_the_path_in_a_checkout_is_understood_elsewhere_with_a_line(
    elsewhere: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_stages("./configs/flickr8k_seed.yaml")[0].run.name == "flickr8k_seed"
    (line,) = caplog.messages
    assert line == (
        "configs/flickr8k_seed.yaml: no such file here; taking the shipped recipe, "
        f"{REPOSITORY / 'configs' / 'flickr8k_seed.yaml'}"
    )


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"CAPDIST_EXIT_FOLDER": "/tmp"}])
def test_the_line_comes_once_from_many_processes(
    elsewhere: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_recipe("configs/scenes.yaml") == REPOSITORY / "configs" / "scenes.yaml"
    assert not caplog.records


@pytest.mark.parametrize("name", ["flickr8", "configs/flickr8.yaml", "other/scenes.yaml", "scenes.yaml", "recipe.yml"])
def test_an_unknown_name_lists_the_known_ones(elsewhere: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_stages(name)
    (line,) = caught.value.mistakes
    assert str(line) == f"{name}: no such recipe; name a YAML file or a shipped recipe: {', '.join(NAMES)}"


@pytest.mark.parametrize("command", [["check", "--config"], ["features", "--config"], ["benchmark", "--config"]])
def test_commands_take_names(command: list[str], elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "flickr8k_frozen", "data.batch_size=0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("capdist: error: command line: data.batch_size: must be ")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# One. Two.\nrun: {}\n", "One."),
        ("# BLEU 0.68 on\n# two lines? Yes.\n", "BLEU 0.68 on two lines?"),
        ("# No full stop\n#\n# Another paragraph.\n", "No full stop"),
        ("#\n# Late.\n", ""),
        ("run: {}  # One.\n", ""),
        ("", ""),
    ],
)
def test_the_first_sentence_of_a_recipe(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert first_sentence(path) == sentence


def test_shipped_recipes_begin_with_a_sentence() -> None:
    for path in shipped_recipes().values():
        assert first_sentence(path).endswith("."), path
