"""Words: what a caption is split into, and the vocabulary that numbers them."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from capdist.errors import CheckpointError, DataError
from capdist.text.tokenizer import TOKENIZER, detokenize, tokenize
from capdist.text.vocabulary import Vocabulary


def _words(caption: str) -> list[str]:
    (words,) = tokenize([caption])
    return words


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog runs .", "a dog runs"),
        ("A dog runs.", "a dog runs"),
        ("TWO DOGS", "two dogs"),
        ("The dog's ball", "the dog 's ball"),
        ("It doesn't bark", "it does n't bark"),
        ("they can't, won't", "they ca n't wo n't"),
        ("I'm here; you're there", "i 'm here you 're there"),
        ("a t-shirt", "a t-shirt"),
        ("black-and-white e-mail", "black-and-white e-mail"),
        ("a well–known man", "a well–known man"),
        ("black / white", "black white"),
        ('a sign says "stop!"', "a sign says stop"),
        ("a dog (brown) , running", "a dog brown running"),
        ("3 dogs, 2.5 metres", "3 dogs 2.5 metres"),
        ("dog & cat", "dog cat"),
        ("a 🐶 dog 👩‍👩‍👧", "a dog"),
        ("ein größeres Café", "ein größeres café"),
        ("a\tdog\nruns\u00a0fast\r\n", "a dog runs fast"),
        ("rock 'n' roll", "rock n roll"),
        ("<pad> <unk>", "pad unk"),
        ("", ""),
        ("   ", ""),
        ("... !?! -- ''", ""),
        ("🐶", ""),
    ],
)
def test_policy(caption: str, expected: str) -> None:
    assert _words(caption) == expected.split()


@pytest.mark.parametrize(
    "caption", ["Café crème", "Ångström", "mañana Ünïcödé", "Việt Nam", "한국어", "J̌ T̈ H̱", "İstanbul"]
)
def test_spelling_in_unicode_does_not_matter(caption: str) -> None:
    forms = [unicodedata.normalize(form, caption) for form in ("NFC", "NFD")]
    lower = [unicodedata.normalize(form, caption.lower()) for form in ("NFC", "NFD")]
    words = tokenize([*forms, *lower])
    assert words[0]
    assert all(other == words[0] for other in words)
    assert all(unicodedata.is_normalized("NFC", word) for word in words[0])


def test_one_list_a_caption_in_order_and_from_an_iterator() -> None:
    assert tokenize(iter(["A dog", "", "cow."])) == [["a", "dog"], [], ["cow"]]
    assert tokenize([]) == []


def test_a_caption_does_not_depend_on_its_neighbours() -> None:
    captions = ["It's a dog.", "dogs' toys", "don't", "a t-shirt", "''", "the man's"]
    alone = [_words(caption) for caption in captions]
    assert tokenize(captions) == alone
    assert tokenize(captions[::-1]) == alone[::-1]


@pytest.mark.parametrize(
    "text",
    ["dog " * 500_000, "x" * 2_000_000, "e\u0301" * 50_000, "a-" * 50_000, "'" * 50_000],
    ids=lambda text: text[:2],
)
def test_a_stray_book_is_cut_not_choked_on(text: str) -> None:
    tokenize([""])  # loads spaCy
    start = time.perf_counter()
    words = _words(text)
    assert time.perf_counter() - start < 5
    assert sum(map(len, words)) <= 10_000
    assert set(words) <= {"dog"} or len(words) == 1
    assert len(words) >= 200 or not text.startswith("dog")


PARTS = (
    ["a dog", "two men", "the boy 's sister".replace(" '", "'"), "an old-fashioned car", "she", "a man who isn't old"],
    ["runs", "doesn't move", "can't jump", "won't stop", "is looking at", "they're watching"],
    ["in the snow", "a woman's hat", "3 children", "the dog's ball at 5 o'clock", "a t-shirt", "über café"],
)
PLAIN = [" ".join(parts) for parts in itertools.product(*PARTS)]


def test_plain_captions_come_back_as_they_were() -> None:
    assert [detokenize(words) for words in tokenize(PLAIN)] == PLAIN


def test_joined_words_split_into_the_same_words() -> None:
    captions = [*PLAIN, "I cannot; gonna go, we'd've", "9am, 5 p.m.", "don’t the dog’s", "U.S. Mr. Smith's", "dont"]
    words = tokenize(captions)
    assert tokenize(map(detokenize, words)) == words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ""),
        (["dog"], "dog"),
        (["the", "dog", "'s", "ball"], "the dog's ball"),
        (["it", "does", "n't"], "it doesn't"),
        (["it", "does", "n’t"], "it doesn’t"),
        (["the", "dog", "’s"], "the dog’s"),
        (["'s", "dog"], "'s dog"),
        (["a", "nut"], "a nut"),
        (["i", "'d", "'ve"], "i'd've"),
    ],
)
def test_detokenize(words: list[str], expected: str) -> None:
    assert detokenize(words) == expected


# --- the vocabulary -------------------------------------------------------------------------------------------------

CAPTIONS = [line.split() for line in ("a dog runs", "a dog sits", "a cat", "the dog", "zebra the", "cat runs runs")]
# Counted by hand: a 3, dog 3, runs 3, cat 2, the 2, sits 1, zebra 1.


@pytest.mark.parametrize(
    ("min_frequency", "expected"),
    [(1, "a dog runs cat the sits zebra"), (2, "a dog runs cat the"), (3, "a dog runs")],
)
def test_words_by_frequency_then_alphabet(min_frequency: int, expected: str) -> None:
    vocabulary = Vocabulary.count(CAPTIONS, min_frequency)
    assert vocabulary.words == ("<pad>", "<bos>", "<eos>", "<unk>", *expected.split())
    assert len(vocabulary) == 4 + len(expected.split())


def test_the_specials_have_fixed_ids_and_no_caption_holds_some() -> None:
    vocabulary = Vocabulary.count(CAPTIONS, 1)
    ids = (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id)
    assert ids == (0, 1, 2, 3)
    assert [vocabulary.words[i] for i in ids] == ["<pad>", "<bos>", "<eos>", "<unk>"]
    assert sorted(vocabulary.suppressed_ids) == [0, 1, 3]


def test_the_order_of_captions_does_not_matter() -> None:
    captions = tokenize(PLAIN)
    expected = Vocabulary.count(captions, 2)
    for seed in range(5):
        shuffled = [random.Random(seed).sample(words, len(words)) for words in captions]
        random.Random(seed).shuffle(shuffled)
        assert Vocabulary.count(shuffled, 2).words == expected.words


def test_words_are_those_of_the_given_captions_and_no_others() -> None:
    seen = {word for caption in CAPTIONS for word in caption}
    vocabulary = Vocabulary.count(iter(CAPTIONS), 1)
    assert set(vocabulary.words[4:]) == seen
    assert vocabulary.encode(["a", "giraffe", "dog"]) == [4, 3, 5]


def test_a_caption_cannot_smuggle_in_a_special() -> None:
    vocabulary = Vocabulary.count([["<eos>", "<pad>", "dog"]] * 3, 1)
    assert vocabulary.words[4:] == ("dog",)


@pytest.mark.parametrize("captions", [[], [[]], [["a"], ["b"]]])
def test_no_frequent_word_is_an_error_of_the_data(captions: list[list[str]]) -> None:
    with pytest.raises(DataError, match=r"text\.min_frequency"):
        Vocabulary.count(captions, 2)


def test_encode_and_decode() -> None:
    vocabulary = Vocabulary.count(CAPTIONS, 1)
    for caption in CAPTIONS:
        ids = vocabulary.encode(caption)
        assert vocabulary.decode(ids) == caption
        assert vocabulary.decode([1, *ids, 2, 0, 0]) == caption
    assert vocabulary.decode([4, 3, 2]) == ["a", "<unk>"]


def test_a_word_stands_once() -> None:
    with pytest.raises(ValueError, match="dog"):
        Vocabulary(["dog", "cat", "dog"])
    with pytest.raises(ValueError, match="<eos>"):
        Vocabulary(["<eos>"])


def test_digest_is_of_words_and_order() -> None:
    vocabulary = Vocabulary(["a", "b", "c"])
    assert vocabulary.digest == Vocabulary(["a", "b", "c"]).digest
    others = [Vocabulary(words) for words in (["a", "c", "b"], ["a", "b"], ["a", "b", "d"], ["a", "bc"])]
    assert len({vocabulary.digest, *(other.digest for other in others)}) == 5


def test_json_round_trip(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["größe", "n't", 'quo"te', "t-shirt", "한국어", "\u2028x"])
    path = tmp_path / "vocabulary.json"
    path.write_text(vocabulary.to_json(), encoding="utf-8")
    again = Vocabulary.load(path)
    assert (again.words, again.digest) == (vocabulary.words, vocabulary.digest)
    assert again.encode(["größe", "x"]) == [4, 3]
    assert "größe" in path.read_text(encoding="utf-8"), "people read this file"


def test_pickle_round_trip() -> None:
    vocabulary = Vocabulary.count(CAPTIONS, 1)
    again = pickle.loads(pickle.dumps(vocabulary))
    assert (again.words, again.digest) == (vocabulary.words, vocabulary.digest)
    assert again.encode(["a", "giraffe"]) == [4, 3]


SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]


def _file(**changes: Any) -> str:
    return json.dumps({"tokenizer": TOKENIZER, "words": [*SPECIALS, "dog"], **changes})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b"\xff\xfe\x00",
        b"<html>",
        json.dumps({"tokenizer": TOKENIZER}).encode(),
        json.dumps({"words": SPECIALS}).encode(),
        _file(words="abcd").encode(),
        _file(words={}).encode(),
        _file(words=None).encode(),
        _file(words=[]).encode(),
        _file(words=["dog", "cat"]).encode(),
        _file(words=[*SPECIALS[::-1], "dog"]).encode(),
        _file(words=[*SPECIALS, "dog", "dog"]).encode(),
        _file(words=[*SPECIALS, "<pad>"]).encode(),
        _file(words=[*SPECIALS, ["dog"]]).encode(),
        _file(words=[*SPECIALS, "dog", 1]).encode(),
        _file(words=[*SPECIALS, None]).encode(),
        _file(words=[*SPECIALS, "\ud800"]).encode(),
        _file(tokenizer="str.split").encode(),
        _file(tokenizer=None).encode(),
    ],
    ids=lambda content: content.decode("latin-1")[-40:] or "empty",
)
def test_foreign_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Vocabulary.load(path)
    (mistake,) = caught.value.lines
    assert mistake.startswith(f"{path}: ")
    assert "\n" not in mistake


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocabulary\.json: missing"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_every_truncation_of_the_file_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "vocabulary.json", Vocabulary(["dog", "cat"]).to_json().encode()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            Vocabulary.load(path)
