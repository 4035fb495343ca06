"""Search settings: declared once, changed by name, the same from the recipe to the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from capdist import cli
from capdist.decoding import SearchOptions
from capdist.errors import UsageError
from capdist.recipe.search import SearchSettings
from capdist.recipe.sections import EvaluationSection

DEFAULTS = {"beam_size": 3, "length_penalty": 0.0, "no_repeat_ngram": 0, "consensus": None, "min_length": 0}


def _mistakes(function: Callable[..., object], **changes: Any) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        function(**changes)
    return caught.value.lines


def test_defaults_are_plain_beam_search() -> None:
    assert dict(SearchSettings()) == DEFAULTS
    assert SearchSettings(consensus=4.0, beam_size=10, min_length=2).plain() == SearchSettings(
        beam_size=10, min_length=2
    )


def test_settings_are_changed_by_name() -> None:
    own = SearchSettings(beam_size=10, consensus=4.0)
    assert own.changed() == own
    assert own.changed(beam_size=None, consensus=None) == own
    assert own.changed(beam_size=5, min_length=2) == SearchSettings(beam_size=5, consensus=4.0, min_length=2)
    assert own.changed(consensus=0).consensus is None
    assert own.changed(no_repeat_ngram=0).no_repeat_ngram == 0


def test_an_unknown_setting_lists_the_known() -> None:
    (mistake,) = _mistakes(SearchSettings().changed, beams=3)
    assert mistake == (
        "beams: is no search setting; known: beam_size, length_penalty, no_repeat_ngram, consensus, min_length"
    )


def test_all_wrong_values_are_told_at_once() -> None:
    assert _mistakes(SearchSettings().changed, beam_size=0, length_penalty="1", consensus=-1.0) == (
        "beam_size: must be greater than or equal to 1, found 0 (int)",
        "length_penalty: must be number, found '1' (str)",
        "consensus: must be greater than 0, found -1.0 (float)",
    )


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, {}),
        ({"beam_size": 1}, {}),
        ({"beam_size": 1, "length_penalty": 1.0, "consensus": 4.0}, {"length_penalty": 2, "consensus": 3}),
        ({"beam_size": 2, "length_penalty": 1.0, "consensus": 4.0}, {"consensus": 3}),
        ({"beam_size": 3, "length_penalty": 1.0, "consensus": 4.0}, {}),
    ],
)
def test_settings_that_need_more_beams_are_idle(settings: dict[str, Any], idle: dict[str, int]) -> None:
    assert SearchSettings(**settings).idle() == idle


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ({}, "beam 3"),
        ({"beam_size": 10, "consensus": 4.0, "no_repeat_ngram": 2}, "beam 10, no repeat ngram 2, consensus 4"),
        ({"length_penalty": 0.5, "min_length": 2}, "beam 3, length penalty 0.5, min length 2"),
    ],
)
def test_a_search_says_what_tells_it_from_others(settings: dict[str, Any], title: str) -> None:
    assert str(SearchSettings(**settings)) == title
    assert str(EvaluationSection(**settings)) == title
    assert str(SearchOptions(bos_id=1, eos_id=2, **settings)) == title


def test_a_recipe_has_the_settings_among_its_keys_and_gives_them_alone() -> None:
    section = EvaluationSection(beam_size=5, batch_size=7)
    assert type(section.search) is SearchSettings
    assert section.search == SearchSettings(beam_size=5)


@pytest.mark.parametrize("command", [cli.evaluate, cli.caption])
def test_every_setting_is_an_option_of_the_command_line(command: Callable[..., None]) -> None:
    parameters = inspect.signature(command).parameters
    assert "search" not in parameters
    assert parameters.keys() >= DEFAULTS.keys()
    assert all(parameters[name].default is None for name in DEFAULTS)


def test_options_have_the_type_the_bounds_and_the_meaning_of_the_declaration() -> None:
    found = {}
    for parameter in cli._search_options():
        kind, option = parameter.annotation.__args__[0], parameter.annotation.__metadata__[0]
        found[parameter.name] = (kind, option.min, option.max)
        described = " ".join((SearchSettings.model_fields[parameter.name].description or "").split())
        assert option.help.startswith(described)
    assert found == {
        "beam_size": (int | None, 1, 100),
        "length_penalty": (float | None, 0, 5),
        "no_repeat_ngram": (int | None, 0, None),
        "consensus": (float | None, 0, None),  # 0 on the command line is null
        "min_length": (int | None, 0, None),
    }


def test_a_command_gets_the_settings_that_were_given() -> None:
    seen: dict[str, Any] = {}

    def command(name: str, *, search: dict[str, Any]) -> None:
        seen.update(search, name=name)

    given = dict.fromkeys(DEFAULTS) | {"beam_size": 5, "consensus": 0.0}
    cli.takes_search(command)(name="a", **given)
    assert seen == {"name": "a", "beam_size": 5, "consensus": 0.0}
