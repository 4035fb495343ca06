"""Rewards against the reference scorers, which read the same token ids as words."""

import warnings

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider_scorer import CiderScorer

from capdist.metrics.rewards import CaptionReward

UNKNOWN = 70  # ids from here on are in no reference

REFERENCES = [
    [[1, 2, 3, 4, 5, 0], [1, 2, 3, 0], [6, 6, 6, 1, 6, 6, 0], [2, 0]],
    [[1, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 0]],
    [[1, 2, 3, 4, 5, 0], [], [4, 3, 2, 1, 0], [4, 3, 2, 1, 0], [1, 2, 1, 2, 1, 2, 1, 2, 0]],
    [[19], [1, 20, 0]],
]
CAPTIONS = {
    "a reference": [1, 2, 3, 4, 5, 0],
    "a reference twice over": [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0],
    "another order": [5, 4, 3, 2, 1, 0],
    "one word repeated": [6, 6, 6, 6, 6, 6, 6, 6, 0],
    "two words repeated": [1, 2, 1, 2, 1, 2, 0],
    "only the end": [0],
    "one word": [19],
    "two words": [1, 2],
    "three words": [2, 3, 4],
    "nothing": [],
    "one unknown word repeated": [1, 2, 3, 70, 70, 70, 70, 70, 0],
    "different unknown words": [1, 2, 3, 70, 71, 72, 73, 74, 0],
    "known words around an unknown": [1, 2, 70, 3, 4, 5, 0],
    "nothing but unknown words": [70, 71, 70, 71],
    "known words in unknown order": [20, 18, 16, 14, 3],
    "words of another image": [1, 7, 8, 9, 10, 11, 0],
    "much longer": [1, 2, 3, 4, 5] * 8,
}


def arrays(references):
    return [[np.array(caption, dtype=np.int64) for caption in captions] for captions in references]


def padded(captions, width=None):
    rows = np.full((len(captions), width or max(map(len, captions), default=0)), -1)
    for row, caption in zip(rows, captions, strict=True):
        row[: len(caption)] = caption
    return rows


def text(caption):
    return " ".join(map(str, caption))


def library_cider(references, captions):
    """CIDEr-D of one caption an image; not a number where an image has no references."""
    scorer = CiderScorer(n=4, sigma=6.0)
    for caption, of_image in zip(captions, references, strict=True):
        scorer += (text(caption), [text(reference) for reference in of_image])
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return scorer.compute_score()[1]


def library_bleu(references, captions):
    images = range(len(references))
    table = {image: [text(reference) for reference in references[image]] for image in images}
    return np.array(Bleu(4).compute_score(table, {i: [text(captions[i])] for i in images}, verbose=0)[1][3])


def random_references(chance, images=25, fewest=1):
    """Captions of 0 to 12 words of a vocabulary in which few words are frequent."""

    def caption():
        return np.minimum(chance.zipf(1.3, size=chance.integers(0, 13)), UNKNOWN) - 1

    return [[caption() for _ in range(chance.integers(fewest, 6))] for _ in range(images)]


def sampled(chance, of_image):
    """A reference of the image with words exchanged for any word, known or not, cut short or repeated."""
    if not of_image:
        return chance.integers(UNKNOWN, size=5)
    caption = of_image[chance.integers(len(of_image))].copy()
    exchanged = chance.random(len(caption)) < 0.2
    caption[exchanged] = chance.integers(UNKNOWN + 5, size=exchanged.sum())
    caption = np.concatenate([caption, caption]) if chance.random() < 0.2 else caption
    return caption[: chance.integers(len(caption) + 1)] if chance.random() < 0.3 else caption


def bleu_reward(references):
    return CaptionReward(references, cider_weight=0, bleu_weight=1)


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_a_caption_of_every_image_scores_as_in_the_library(caption):
    images, captions = np.arange(len(REFERENCES)), [caption] * len(REFERENCES)
    cider, bleu = CaptionReward(arrays(REFERENCES)), bleu_reward(arrays(REFERENCES))
    np.testing.assert_allclose(
        cider(images, padded(captions)), library_cider(REFERENCES, captions), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        bleu(images, padded(captions)), library_bleu(REFERENCES, captions), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize("seed", range(5))
def test_random_captions_score_as_in_the_library(seed):
    chance = np.random.default_rng(seed)
    references = random_references(chance)
    images = np.arange(len(references))
    captions = [sampled(chance, of_image) for of_image in references]
    cider, bleu = library_cider(references, captions), library_bleu(references, captions)
    assert (cider > 0.5).sum() > 5
    assert (bleu > 0.1).sum() > 5
    np.testing.assert_allclose(CaptionReward(references)(images, padded(captions)), cider, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(bleu_reward(references)(images, padded(captions)), bleu, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("where", [0, 2, 4])
def test_an_image_without_captions_counts_as_an_image_and_earns_nothing(where):
    references = REFERENCES[:where] + [[]] + REFERENCES[where:]
    captions = [[1, 2, 3, 4, 5, 0]] * len(references)
    images = np.arange(len(references))
    reward = CaptionReward(arrays(references), bleu_weight=1)
    assert reward(images, padded(captions))[where] == 0
    expected = np.nan_to_num(library_cider(references, captions))
    np.testing.assert_allclose(
        CaptionReward(arrays(references))(images, padded(captions)), expected, rtol=1e-9, atol=1e-12
    )


def test_words_that_every_image_mentions_earn_no_cider():
    references = [[[1, 2, 3], [4]], [[1, 2, 3, 4, 5]], [[4, 0, 1, 2, 3]]]
    for caption in ([1, 2, 3], [4], [1, 2, 3, 4]):
        captions = [caption] * 3
        cider = CaptionReward(arrays(references))(np.arange(3), padded(captions))
        np.testing.assert_allclose(cider, library_cider(references, captions), rtol=1e-9, atol=1e-12)
    assert CaptionReward(arrays(references))(np.arange(3), padded([[1, 2, 3]] * 3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("references", [[[]], [[], []], [[[]], [[], []]], [[[3]]], [[[1, 2, 3, 4, 5]]]], ids=str)
def test_references_of_which_nothing_can_be_learnt_earn_no_cider(references):
    reward = CaptionReward(arrays(references))
    assert reward(np.array([0, 0]), padded([[1, 2, 3, 4, 5], []])).tolist() == [0, 0]


def test_the_reward_is_the_weighted_sum_and_cider_alone_if_nothing_is_said():
    captions = [[1, 2, 3, 4, 5, 0], [1, 7, 8, 9, 10, 0], [4, 3, 2, 1, 0], [1, 20]]
    arguments = (np.arange(4), padded(captions))
    cider, bleu = library_cider(REFERENCES, captions), library_bleu(REFERENCES, captions)
    references = arrays(REFERENCES)
    np.testing.assert_allclose(CaptionReward(references)(*arguments), cider, rtol=1e-9)
    mixed = CaptionReward(references, cider_weight=0.5, bleu_weight=2)
    np.testing.assert_allclose(mixed(*arguments), 0.5 * cider + 2 * bleu, rtol=1e-9)
    np.testing.assert_allclose(CaptionReward(references, cider_weight=0, bleu_weight=1)(*arguments), bleu, rtol=1e-9)


@pytest.fixture(scope="module")
def call():
    """A reward of both kinds, and a call with several captions an image, images without captions among them."""
    chance = np.random.default_rng(11)
    references = random_references(chance, fewest=0)
    images = chance.integers(len(references), size=60)
    captions = padded([sampled(chance, references[image]) for image in images])
    return references, CaptionReward(references, bleu_weight=1), images, captions


def test_the_order_of_rows_does_not_matter(call):
    _, reward, images, captions = call
    order = np.random.default_rng(0).permutation(len(images))
    np.testing.assert_allclose(reward(images[order], captions[order]), reward(images, captions)[order], rtol=1e-12)


def test_a_reward_does_not_depend_on_the_other_captions(call):
    _, reward, images, captions = call
    alone = [reward(images[row : row + 1], captions[row : row + 1])[0] for row in range(len(images))]
    np.testing.assert_allclose(reward(images, captions), alone, rtol=1e-12)
    assert len(set(alone)) > 20


def test_more_room_than_needed_changes_nothing(call):
    _, reward, images, captions = call
    wider = np.pad(captions, ((0, 0), (0, 7)), constant_values=-1)
    np.testing.assert_array_equal(reward(images, wider), reward(images, captions))


def test_rows_of_no_columns_and_calls_of_no_rows_are_scored(call):
    _, reward, images, captions = call
    empty = np.full_like(captions, -1)
    np.testing.assert_array_equal(reward(images, empty[:, :0]), reward(images, empty))
    assert reward(images[:0], captions[:0]).shape == (0,)


def test_ids_are_only_names_up_to_the_largest(call):
    references, reward, images, captions = call
    chance = np.random.default_rng(0)
    names = chance.choice(2**31 - 1, size=UNKNOWN + 5, replace=False)
    names[1] = 2**31 - 1  # a frequent word
    renamed = CaptionReward([[names[caption] for caption in of_image] for of_image in references], bleu_weight=1)
    other = np.where(captions >= 0, names[captions], -1)
    np.testing.assert_allclose(renamed(images, other), reward(images, captions), rtol=1e-12)


def test_what_is_scored_does_not_change_later_rewards_or_its_input(call):
    _, reward, images, captions = call
    before = images.copy(), captions.copy()
    first = reward(images, captions)
    reward(images[::-1], np.where(captions[::-1] >= 0, UNKNOWN, -1))
    np.testing.assert_array_equal(reward(images, captions), first)
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(captions, before[1])
