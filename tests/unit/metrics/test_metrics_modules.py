"""The `evaluate` modules: their contract, what they refuse, and that they need neither hub nor disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

from capdist import metrics
from capdist.errors import UsageError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "caption_scores.json").read_text(encoding="utf-8"))
PREDICTIONS = [image["caption"] for image in GOLDEN["images"].values()]
REFERENCES = [image["references"] for image in GOLDEN["images"].values()]
KEYS = {"bleu": ["bleu_1", "bleu_2", "bleu_3", "bleu_4"], "rouge_l": ["rouge_l"], "cider": ["cider"]}


@pytest.mark.parametrize("name", KEYS)
def test_raw_text_scores_as_the_whole_java_pipeline_scored_it(name):
    metric = metrics.load(name)
    assert isinstance(metric, evaluate.Metric)
    scores = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert scores == pytest.approx({key: GOLDEN["scores"][key] for key in KEYS[name]}, abs=1e-6)


@pytest.mark.parametrize("name", KEYS)
def test_batches_score_like_the_whole(name):
    metric = metrics.load(name)
    metric.add_batch(predictions=PREDICTIONS[:2], references=REFERENCES[:2])
    for prediction, captions in zip(PREDICTIONS[2:], REFERENCES[2:], strict=True):
        metric.add(prediction=prediction, reference=captions)
    assert metric.compute() == metric.compute(predictions=PREDICTIONS, references=REFERENCES)


def test_text_that_is_already_split_is_taken_as_it_is():
    metric = metrics.load("bleu")
    split = {"predictions": ["A dog ."], "references": [["a dog"]]}
    assert metric.compute(**split)["bleu_2"] == pytest.approx(1)
    assert metric.compute(**split, tokenize=False)["bleu_1"] == pytest.approx(1 / 3)


def test_meteor_without_java_is_none_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = metrics.load("meteor").compute(predictions=["a dog"], references=[["a dog"]])
    assert scores["meteor"] is None
    assert isinstance(scores["meteor_reason"], str)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'bleu'"):
        metrics.load("blue")
    with pytest.raises(UsageError, match="bleu, cider, meteor, rouge_l"):
        metrics.load("spice")


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "0 predictions"),
        (["a", "b"], [["a"]], "2 predictions but 1 "),
        (["a", "b", "c"], [["a"], [], []], "2 of 3 images have no references, the first at index 1"),
        (["a dog"], ["a dog"], r"references\[0\] is a string"),
        (["a dog"], None, "both predictions and references"),
        (None, None, "nothing to score"),
    ],
)
def test_unusable_input_is_refused_with_its_counts(predictions, references, message):
    metric = metrics.load("bleu")
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)
    # What was refused leaves nothing behind.
    assert metric.compute(predictions=["a b c d"], references=[["a b c d"]])["bleu_4"] == pytest.approx(1)


def test_neither_hub_nor_cache_folder_is_touched(tmp_path):
    home = tmp_path / "home"
    program = (
        "import socket\n"
        "def refuse(*_): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from capdist import metrics\n"
        "print(metrics.load('rouge_l').compute(predictions=['a dog'], references=[['A dog.']])['rouge_l'])\n"
    )
    environment = os.environ | {"HF_HOME": str(home), "HF_METRICS_CACHE": str(home / "metrics")}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.strip() == "1.0", ended.stderr
    assert not home.exists() or not [path for path in home.rglob("*") if path.is_file()]
    assert not (home / "metrics" / "rouge_l").exists()
