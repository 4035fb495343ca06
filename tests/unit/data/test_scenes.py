"""The drawn scenes: the same everywhere, no scene twice, captions true, too varied for one caption to fit all."""

from __future__ import annotations

import hashlib
import io
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from typing import Any

import pytest
from PIL import Image

from capdist.data import scenes
from capdist.data.scenes import COLOURS, SHAPES, SPLIT_SIZES, build_scenes, describe_scenes

DIGEST = """
import hashlib
from capdist.data.scenes import build_scenes
print(hashlib.sha256(repr(build_scenes(limit=40)).encode()).hexdigest())
"""


@cache
def _rows() -> dict[str, list[dict[str, Any]]]:
    return build_scenes()


def _words(caption: str) -> list[str]:
    return re.findall(r"[a-z]+", caption.lower())


def test_same_scenes_in_every_process() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    ]
    here = hashlib.sha256(repr(build_scenes(limit=40)).encode()).hexdigest()
    assert runs == [here, here]


def test_sizes_ids_and_limit() -> None:
    assert {split: len(rows) for split, rows in _rows().items()} == SPLIT_SIZES
    ids = [row["image_id"] for rows in _rows().values() for row in rows]
    assert len(set(ids)) == len(ids)
    assert _rows()["test"][7]["image_id"] == "scene_test_00007"
    assert build_scenes(limit=3)["validation"] == _rows()["validation"][:3]


def test_pictures_are_small_rgb_and_all_different() -> None:
    contents = [row["image"]["bytes"] for rows in _rows().values() for row in rows]
    assert len(set(contents)) == len(contents)
    for content in contents[::300]:
        picture = Image.open(io.BytesIO(content))
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (128, 128))


def test_no_scene_twice_not_even_in_another_split() -> None:
    descriptions = [scene for split in describe_scenes().values() for scene in split]
    assert len(set(descriptions)) == len(descriptions) == 2_400


@pytest.mark.parametrize("split", list(SPLIT_SIZES))
def test_captions_are_true_and_different(split: str) -> None:
    for scene, row in zip(describe_scenes()[split], _rows()[split], strict=True):
        assert len(set(row["captions"])) == 5
        pairs = {(shape.colour, shape.form) for shape in scene.shapes}
        sizes = {shape.colour: scenes.SIZES[shape.size] for shape in scene.shapes}
        place = scenes.BACKGROUNDS[scene.background].split()
        for caption in row["captions"]:
            words = _words(caption)
            named = [(word, words[at + 1]) for at, word in enumerate(words) if word in COLOURS]
            assert set(named) == pairs, caption
            assert sum(word in SHAPES for word in words) == len(pairs), caption
            assert words[-len(place) :] == place or words[: len(place)] == place, caption
            for at, word in enumerate(words[1:], start=1):
                if word in COLOURS and words[at - 1] in ("large", "big", "small", "little"):
                    assert words[at - 1] in sizes[word], caption


def test_relations_have_the_right_way_round() -> None:
    orders = {
        "left of": 1,
        "right of": -1,
        "above": 1,
        "over": 1,
        "below": -1,
        "inside": 1,
        "middle of": 1,
        "around": -1,
    }
    seen: Counter[str] = Counter()
    for scene, row in zip(describe_scenes()["train"], _rows()["train"], strict=True):
        for caption in row["captions"]:
            relation = next((words for words in orders if words in caption), None)
            if relation:
                seen[relation] += 1
                colours = [shape.colour for shape in scene.shapes][:: orders[relation]]
                assert [word for word in _words(caption) if word in COLOURS] == colours, caption
    assert set(seen) == set(orders)


def test_shapes_stand_where_the_words_say() -> None:
    for split in describe_scenes().values():
        for scene in split[:100]:
            centres, radii = zip(*scenes._places(scene, random.Random(1)), strict=True)
            for (x, y), radius in zip(centres, radii, strict=True):
                assert radius < x < 1 - radius
                assert radius < y < 1 - radius
            if scene.layout == "left":
                assert centres[0][0] + radii[0] < centres[1][0] - radii[1] + 4 / 64
            if scene.layout == "above":
                assert centres[0][1] + radii[0] < centres[1][1] - radii[1] + 4 / 64


def test_vocabulary_is_small() -> None:
    words = Counter(word for row in _rows()["train"] for caption in row["captions"] for word in _words(caption))
    assert 40 <= len(words) <= 80
    assert min(words.values()) >= 20
    unseen = {word for row in _rows()["test"] for caption in row["captions"] for word in _words(caption)} - set(words)
    assert not unseen


def _score(captions: list[str]) -> tuple[float, float]:
    """BLEU-4 and CIDEr of one caption for each test scene."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    plain = [[" ".join(_words(caption)) for caption in row["captions"]] for row in _rows()["test"]]
    references = dict(enumerate(plain))
    candidates = {number: [" ".join(_words(caption))] for number, caption in enumerate(captions)}
    bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    cider, _ = Cider().compute_score(references, candidates)
    return bleu[3], float(cider)


def test_no_single_caption_scores_well() -> None:
    frequent = Counter(caption for row in _rows()["train"] for caption in row["captions"]).most_common(4)
    scattered = [row["captions"][number % 5] for number, row in enumerate(_rows()["train"][:400:40])]
    scores = [_score([caption] * 200) for caption in [caption for caption, _ in frequent] + scattered]
    assert max(bleu for bleu, _ in scores) < 0.3
    assert max(cider for _, cider in scores) < 1.5


def test_knowing_the_scene_scores_high() -> None:
    fresh = [
        random.Random(number).choice(scenes.write_captions(scene, random.Random(f"again {number}")))
        for number, scene in enumerate(describe_scenes()["test"])
    ]
    bleu, cider = _score(fresh)
    assert bleu > 0.8
    assert cider > 4
