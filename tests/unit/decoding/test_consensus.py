"""Captions that agree with the others, against loops over sets of words."""

from __future__ import annotations

import math

import pytest
import torch
from toy_decoder import BOS, EOS, PAD, ToyDecoder, make_features, make_options

from capdist.decoding import SearchOptions, SearchResult, search
from capdist.decoding.consensus import agree

FIRST = 4  # ids below are special


def options_for(temperature: float) -> SearchOptions:
    return SearchOptions(bos_id=BOS, eos_id=EOS, pad_id=PAD, suppressed_ids=(0, 1, 3), consensus=temperature)


def candidates(seed: int, images: int = 6, rows: int = 7, positions: int = 9) -> SearchResult:
    """Random captions, the last rows of some images empty or cut off."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, positions + 1, (images, rows), generator=draw)
    lengths[0, 5:] = 0
    lengths[1, :] = 0
    lengths[2, 3] = 0  # ended without a word
    tokens = torch.randint(FIRST, FIRST + 12, (images, rows, positions), generator=draw)
    tokens = tokens.where(torch.arange(positions) < lengths[..., None], PAD)
    totals = torch.randn(images, rows, generator=draw) * 4 - 9
    totals[0, 5:] = totals[1, :] = -math.inf
    ended = (torch.rand(images, rows, generator=draw) < 0.7) & (totals > -math.inf)
    attention = torch.rand(images, rows, positions, 3, generator=draw)
    return SearchResult(tokens, lengths, totals, totals.clone(), ended, attention)


def gains_of(found: SearchResult, image: int, temperature: float) -> list[float]:
    """Mean likeness of each caption of an image to all of them, by the definition."""
    rows = [row for row in range(found.lengths.shape[1]) if found.log_probabilities[image, row] > -math.inf]
    bags = [set(found.tokens[image, row, : found.lengths[image, row]].tolist()) for row in rows]
    trust = [math.exp(found.log_probabilities[image, row].item() / temperature) for row in rows]

    def weight(words: set[int]) -> float:
        return sum(math.log(word - FIRST + 1) for word in words)

    def likeness(one: int, other: int) -> float:
        whole = weight(bags[one]) + weight(bags[other])
        return 1.0 if one == other else 2 * weight(bags[one] & bags[other]) / whole if whole else 0.0

    captions = range(len(rows))
    return [sum(trust[other] * likeness(one, other) for other in captions) / sum(trust) for one in captions]


@pytest.mark.parametrize("temperature", [0.5, 4.0, 1e6])
@pytest.mark.parametrize("seed", range(3))
def test_candidates_are_ranked_by_mean_likeness(temperature: float, seed: int) -> None:
    found = candidates(seed)
    ranked = agree(found, options_for(temperature))
    for image in range(len(found.tokens)):
        gains = gains_of(found, image, temperature)
        order = sorted(range(len(gains)), key=lambda row: (not found.ended[image, row], -gains[row]))
        count = len(order)
        assert ranked.scores[image, :count].tolist() == pytest.approx([gains[row] for row in order], abs=1e-6)
        assert ranked.scores[image, count:].tolist() == [-math.inf] * (len(found.lengths[image]) - count)
        for name in ("tokens", "lengths", "log_probabilities", "ended", "attention"):
            values = getattr(found, name)[image]
            assert torch.equal(getattr(ranked, name)[image, :count], values[order]), name


def test_a_caption_that_two_others_share_beats_a_more_probable_loner() -> None:
    tokens = torch.tensor([[[9, 10, 11], [12, 13, 14], [12, 13, 15]]])
    totals = torch.tensor([[-3.0, -3.5, -3.6]])
    found = SearchResult(tokens, torch.full((1, 3), 3), totals, totals, totals < 0, None)
    ranked = agree(found, options_for(4.0))
    assert ranked.tokens[0, 0].tolist() == [12, 13, 14]
    # Trusted by its probability alone, and almost nothing else, the first one stays.
    assert agree(found, options_for(0.01)).tokens[0, 0].tolist() == [9, 10, 11]


def test_frequent_words_count_less() -> None:
    """The first two share the most frequent words of all, the last two a rare one."""
    tokens = torch.tensor([[[4, 5, 900], [4, 5, 800], [6, 7, 1000], [4, 8, 1000]]])
    totals = torch.zeros(1, 4)
    found = SearchResult(tokens, torch.full((1, 4), 3), totals, totals, totals == 0, None)
    assert agree(found, options_for(1.0)).tokens[0, :2, 2].tolist() == [1000, 1000]


def test_search_ranks_by_agreement_if_asked() -> None:
    decoder, features = ToyDecoder(seed=1), make_features(5)
    plain = search(decoder, features, make_options(beam_size=6))
    asked = make_options(beam_size=6, consensus=4.0)
    agreed = search(decoder, features, asked)
    expected = agree(plain, asked)
    assert torch.equal(agreed.tokens, expected.tokens)
    assert torch.equal(agreed.scores, expected.scores)
    assert not torch.equal(agreed.tokens, plain.tokens)
    two = [search(decoder, features, make_options(beam_size=2, consensus=asked)) for asked in (4.0, None)]
    assert torch.equal(two[0].scores, two[1].scores), "two captions agree with each other equally"
    assert sorted(agreed.log_probabilities[0].tolist()) == sorted(plain.log_probabilities[0].tolist())
