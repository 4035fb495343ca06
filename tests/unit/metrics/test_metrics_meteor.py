"""METEOR: the reference's score where Java works, a reason where it does not, and never a process left behind."""

import json
import os
import shutil
from pathlib import Path

import pytest

from capdist.metrics import CaptionScorer
from capdist.metrics.coco import score_meteor
from capdist.metrics.meteor import meteor

GOLDEN = Path(__file__).parents[2] / "golden" / "caption_scores.json"
REFERENCES = {0: ["a dog runs", "the dog is running"], 1: ["a red car"]}
HYPOTHESES = {0: ["a dog"], 1: ["a car"]}


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Return a function that puts a shell script called java, which notes its process id, first on PATH."""

    def install(script: str) -> Path:
        noted = tmp_path / "pid"
        program = tmp_path / "java"
        program.write_text(f"#!/bin/sh\necho $$ > '{noted}'\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return noted

    return install


def is_alive(noted: Path) -> bool:
    try:
        os.kill(int(noted.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_without_java_there_is_no_score_but_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = score_meteor([["a", "dog"]], [[["a", "dog"]]])
    assert scores["meteor"] is None
    assert "PATH" in scores["meteor_reason"]


def test_without_java_the_other_metrics_are_still_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    scorer = CaptionScorer({"a": ["a dog runs"], "b": ["a red car"]})
    scorer.add_many([("a", "a dog runs"), ("b", "a red car")])
    scores = scorer.compute()
    assert scores["bleu_1"] == pytest.approx(1)
    assert scores["meteor"] is None


def test_a_java_that_fails_gives_its_complaint_as_the_reason(fake_java):
    noted = fake_java("echo 'Could not reserve enough space' >&2; exit 3")
    score, reason = meteor(REFERENCES, HYPOTHESES)
    assert score is None
    assert "code 3" in reason
    assert "Could not reserve enough space" in reason
    assert not is_alive(noted)


def test_a_java_that_complains_at_length_does_not_block(fake_java):
    # Far more than a pipe holds; a reader that does not read would stop both sides.
    fake_java("head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 1")
    assert meteor(REFERENCES, HYPOTHESES, seconds=60)[0] is None


@pytest.mark.parametrize("script", ["exec sleep 600", "read line; exec sleep 600"])
def test_a_java_that_hangs_is_ended(fake_java, script):
    noted = fake_java(script)
    score, reason = meteor(REFERENCES, HYPOTHESES, seconds=0.5)
    assert score is None
    assert "within" in reason
    assert not is_alive(noted)


def test_a_java_that_answers_nonsense_gives_a_reason(fake_java):
    noted = fake_java("while read line; do echo nonsense; done")
    score, reason = meteor(REFERENCES, HYPOTHESES, seconds=60)
    assert score is None
    assert reason
    assert not is_alive(noted)


def test_text_cannot_break_the_line_protocol(fake_java, tmp_path):
    """One line a message, fields apart by |||: what a caption holds of these must not reach the jar."""
    said = tmp_path / "said"
    # To the second message, the request for the scores, the jar answers one line an image and one for them all.
    fake_java(f"read -r line; echo \"$line\" > '{said}'; echo 1 2; read -r line; echo 0.25; echo 0.5; read -r line")
    assert meteor({0: ["a ||| b\nc"]}, {0: ["d\u2028e"]}, seconds=60) == (0.5, None)
    assert said.read_text(encoding="utf-8").splitlines()[0] == "SCORE ||| a b c ||| d e"


@pytest.mark.java
@pytest.mark.slow
def test_the_score_is_that_of_pycocoevalcap_and_java_is_gone_afterwards(fake_java, monkeypatch):
    java = shutil.which("java")
    if java is None:
        pytest.skip("no java on PATH: METEOR is not compared with its reference")
    noted = fake_java(f"exec '{java}' \"$@\"")
    # A user's Java may be set to write numbers with a comma and to know no accents.
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE -Dfile.encoding=US-ASCII")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    scorer = CaptionScorer({key: image["references"] for key, image in golden["images"].items()})
    scorer.add_many((key, image["caption"]) for key, image in golden["images"].items())
    assert scorer.compute(["meteor"]) == {"meteor": pytest.approx(golden["scores"]["meteor"], abs=1e-6)}
    assert not is_alive(noted)


@pytest.mark.java
@pytest.mark.slow
def test_empty_captions_score_nothing():
    if shutil.which("java") is None:
        pytest.skip("no java on PATH: METEOR of empty captions is not tried")
    assert score_meteor([[], []], [[["a", "dog"]], [["a", "car"]]]) == {"meteor": 0.0}
