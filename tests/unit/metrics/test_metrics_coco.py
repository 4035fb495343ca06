"""Scores against worked examples, a second implementation, the reference called directly, and its kept answers."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from capdist.metrics.coco import score_bleu, score_cider, score_rouge_l

GOLDEN = Path(__file__).parents[2] / "golden" / "caption_scores.json"


def words(*captions: str) -> list[list[str]]:
    return [caption.split() for caption in captions]


def random_corpus(seed: int, images: int = 40) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Captions of few words in many orders, so that n-grams of every length match now and then."""
    chance = random.Random(seed)

    def caption() -> list[str]:
        return chance.choices(["a", "dog", "runs", "on"], k=chance.randint(1, 12))

    return [caption() for _ in range(images)], [[caption() for _ in range(chance.randint(1, 5))] for _ in range(images)]


def naive_bleu(hypotheses, references, order):
    """Papineni et al. 2002, section 2, written down once more; reference length closest, the shorter on a tie."""
    log_precision, length, closest = 0.0, 0, 0
    for n in range(1, order + 1):
        matched = total = 0
        for hypothesis, captions in zip(hypotheses, references, strict=True):
            grams = [Counter(tuple(c[i : i + n]) for i in range(len(c) - n + 1)) for c in [hypothesis, *captions]]
            matched += sum(min(count, max(r[gram] for r in grams[1:])) for gram, count in grams[0].items())
            total += grams[0].total()
        log_precision += math.log(matched / total) / order
    for hypothesis, captions in zip(hypotheses, references, strict=True):
        length += len(hypothesis)
        closest += min((abs(len(c) - len(hypothesis)), len(c)) for c in captions)[1]
    return math.exp(log_precision + min(0.0, 1 - closest / length))


def test_papineni_clips_repeated_words():
    references = [words("the cat is on the mat", "there is a cat on the mat")]
    assert score_bleu(words("the the the the the the the"), references)["bleu_1"] == pytest.approx(2 / 7)


def test_a_short_caption_pays_the_brevity_penalty():
    assert score_bleu(words("a b"), [words("a b c d")])["bleu_1"] == pytest.approx(math.exp(1 - 4 / 2))


@pytest.mark.parametrize("seed", range(5))
def test_bleu_agrees_with_a_second_implementation(seed):
    hypotheses, references = random_corpus(seed)
    scores = score_bleu(hypotheses, references)
    for order in (1, 2, 3, 4):
        assert scores[f"bleu_{order}"] == pytest.approx(naive_bleu(hypotheses, references, order), abs=1e-6)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # "a c d" is common: precision 3/4, recall 3/5, beta 1.2.
    precision, recall, beta2 = 3 / 4, 3 / 5, 1.44
    expected = (1 + beta2) * precision * recall / (recall + beta2 * precision)
    assert score_rouge_l(words("a b c d"), [words("a c d e f")])["rouge_l"] == pytest.approx(expected)


def test_cider_is_the_mean_cosine_over_orders_times_ten():
    # Every n-gram occurs in one image, so all weigh the same: cosines 2/4 and 1/3 for pairs, none beyond; the
    # second image shares no word.
    hypotheses = words("a b x y", "p q r s")
    references = [words("a b c d"), words("e f g h")]
    expected = 10 * ((2 / 4 + 1 / 3) / 4 + 0) / 2
    assert score_cider(hypotheses, references)["cider"] == pytest.approx(expected)


def test_cider_of_words_in_every_image_is_nothing():
    assert score_cider(words("a b", "a b"), [words("a b"), words("a b")])["cider"] == 0


@pytest.mark.parametrize(("scorer", "best"), [(score_bleu, 1), (score_rouge_l, 1), (score_cider, 10)])
def test_a_perfect_match_scores_highest(scorer, best):
    captions = words("a dog runs on grass", "two red cars race by")
    scores = scorer(captions, [[caption] for caption in captions])
    assert list(scores.values()) == pytest.approx([best] * len(scores), abs=1e-6)


@pytest.mark.parametrize("scorer", [score_bleu, score_rouge_l, score_cider])
def test_the_order_of_references_does_not_matter(scorer):
    hypotheses, references = random_corpus(0)
    reversed_references = [captions[::-1] for captions in references]
    assert scorer(hypotheses, references) == pytest.approx(scorer(hypotheses, reversed_references))


@pytest.mark.parametrize("scorer", [score_bleu, score_rouge_l, score_cider])
def test_an_empty_caption_scores_and_scores_lower(scorer):
    captions = words("a dog runs on grass", "two red cars race by", "the sun is up now")
    references = [[caption] for caption in captions]
    full, gap = scorer(captions, references), scorer([*captions[:2], []], references)
    assert all(0 < gap[name] < full[name] for name in full)
    assert all(score == pytest.approx(0) for score in scorer([[], [], []], references).values())


@pytest.mark.parametrize("scorer", [score_bleu, score_cider])
def test_references_without_a_word_score_nothing(scorer):
    assert all(score == pytest.approx(0, abs=1e-6) for score in scorer([["a"]], [[[]]]).values())


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_pycocoevalcap(seed, capsys):
    hypotheses, references = random_corpus(seed)
    gts = {i: [" ".join(c) for c in captions] for i, captions in enumerate(references)}
    res = {i: [" ".join(c)] for i, c in enumerate(hypotheses)}
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    assert list(score_bleu(hypotheses, references).values()) == pytest.approx(bleu, abs=1e-6)
    assert score_rouge_l(hypotheses, references)["rouge_l"] == pytest.approx(
        Rouge().compute_score(gts, res)[0], abs=1e-6
    )
    assert score_cider(hypotheses, references)["cider"] == pytest.approx(Cider().compute_score(gts, res)[0], abs=1e-6)
    assert capsys.readouterr().out == ""


def test_scores_are_plain_floats_that_json_takes():
    hypotheses, references = random_corpus(1)
    for scorer in (score_bleu, score_rouge_l, score_cider):
        assert all(type(score) is float for score in scorer(hypotheses, references).values())


def test_raw_text_scores_as_the_whole_java_pipeline_scored_it():
    from capdist.metrics import CaptionScorer

    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    scorer = CaptionScorer({key: image["references"] for key, image in golden["images"].items()})
    scorer.add_many((key, image["caption"]) for key, image in golden["images"].items())
    scores = scorer.compute(["bleu", "rouge_l", "cider"])
    assert scores == pytest.approx({name: golden["scores"][name] for name in scores}, abs=1e-6)
    assert len(scores) == 6
