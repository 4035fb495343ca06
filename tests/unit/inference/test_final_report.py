"""What a run prints at its end: texts of people are shown as they are."""

from __future__ import annotations

import pytest

from capdist.evaluation.report import print_scores


def test_captions_and_names_are_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_scores("mugs[/b]: test", {"cider": 0.5}, ("a [red] mug :dog: [/]", {"cider": 0.25}))
    out = capsys.readouterr().out
    assert "mugs[/b]: test" in out
    assert "“a [red] mug :dog: [/]”" in out
