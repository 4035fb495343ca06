"""The tokeniser against the Java tool it stands for: kept answers always, the tool itself where there is one."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from capdist.metrics import tokenize
from capdist.metrics.coco import score_bleu

GOLDEN = Path(__file__).parents[2] / "golden" / "ptb_tokens.json"
JAVA_TOKENS: dict[str, str] = json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", JAVA_TOKENS)
def test_tokens_are_those_of_the_java_tool(text):
    assert tokenize(text) == JAVA_TOKENS[text].split()


@pytest.mark.parametrize("text", ["", " ", "\n", "...", "\"'-,;:", "🙂", "\x00\x07"])
def test_text_without_words_has_no_tokens(text):
    assert tokenize(text) == []


@pytest.mark.parametrize("space", ["\n", "\t", "\u00a0", "  ", "\r\n"])
def test_any_white_space_separates_words(space):
    assert tokenize(f"a{space}man's{space}dog{space}.{space}") == ["a", "man", "'s", "dog"]


@pytest.mark.parametrize("unit", ["a", "a-", "w+", "1.", "a.", "@", "a@", "'", "n't", "<a", "A&", "a_"])
def test_a_degenerate_text_takes_time_in_proportion_to_its_length(unit):
    # 40,000 characters: a pattern that goes back over what it read needs minutes.
    start = time.perf_counter()
    tokenize(unit * (40_000 // len(unit)))
    assert time.perf_counter() - start < 5


@pytest.fixture(scope="module")
def dev_captions() -> list[list[str]]:
    """The five captions of each image of the Flickr8k dev split."""
    root = os.environ.get("FLICKR8K_ROOT")
    if not root:
        pytest.skip("FLICKR8K_ROOT is not set: not compared with Java on Flickr8k")
    text = Path(root, "Flickr8k_text")
    captions: dict[str, list[str]] = {}
    for line in (text / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
        key, caption = line.split("\t")
        captions.setdefault(key.split("#")[0], []).append(caption)
    names = (text / "Flickr_8k.devImages.txt").read_text(encoding="utf-8").split()
    return [captions[name] for name in names]


@pytest.fixture(scope="module")
def java_tokens(dev_captions, tmp_path_factory) -> list[list[list[str]]]:
    """The same captions as the jar in pycocoevalcap splits them, called as pycocoevalcap calls it."""
    if shutil.which("java") is None:
        pytest.skip("no java on PATH: not compared with Java on Flickr8k")
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    lines = tmp_path_factory.mktemp("java") / "captions.txt"
    lines.write_text("\n".join(c for captions in dev_captions for c in captions) + "\n", encoding="utf-8")
    tokenizer = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(lines)]
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), *tokenizer]
    output = subprocess.run(command, capture_output=True, check=True, timeout=120).stdout.decode()
    split = iter(
        [word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS] for line in output.splitlines()
    )
    return [[next(split) for _ in captions] for captions in dev_captions]


@pytest.mark.java
@pytest.mark.flickr8k
def test_captions_of_flickr8k_are_split_as_java_splits_them(dev_captions, java_tokens):
    assert len(java_tokens) == 1000
    ours = [[tokenize(caption) for caption in captions] for captions in dev_captions]
    differing = [
        (caption, our, java)
        for captions, ours_of, java_of in zip(dev_captions, ours, java_tokens, strict=True)
        for caption, our, java in zip(captions, ours_of, java_of, strict=True)
        if our != java
    ]
    assert differing == []


@pytest.mark.java
@pytest.mark.flickr8k
@pytest.mark.parametrize("k", range(5))
def test_bleu_of_human_captions_is_that_with_java_tokens(dev_captions, java_tokens, k):
    def human(tokens):
        rest = [captions[:k] + captions[k + 1 :] for captions in tokens]
        return score_bleu([captions[k] for captions in tokens], rest)

    ours = human([[tokenize(caption) for caption in captions] for captions in dev_captions])
    assert ours == pytest.approx(human(java_tokens), abs=0.002)
    assert 0.55 < ours["bleu_1"] < 0.75  # what people reach, so the comparison is not one of zeros
