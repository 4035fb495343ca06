"""Sampling against the distribution that it claims to draw from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy_decoder import EOS, A, B, C, PlainModel, ToyDecoder, has_repeat, make_features, make_options

from capdist.decoding import SearchResult, greedy_search, sample

DRAWS = 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts_of_first_word(result: SearchResult) -> Tensor:
    first = torch.where(result.lengths[0] > 0, result.tokens[0, :, 0], EOS)
    return first.bincount(minlength=6).double()


def assert_drawn_from(counts: Tensor, probabilities: Tensor) -> None:
    assert torch.all(counts[probabilities == 0] == 0)
    possible = probabilities > 0
    expected = probabilities[possible] * counts.sum()
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum().item()
    assert chi_square < 20  # with at most 3 degrees of freedom: p < 0.0002


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(sharpness: float) -> None:
    decoder, features = ToyDecoder(sharpness=sharpness), make_features(1)
    options = make_options(max_length=1)
    result = sample(decoder, features, options, DRAWS, generator=seeded())
    log_p = torch.tensor(PlainModel(decoder, features[0]).next([]), dtype=torch.float64)
    log_p[:2] = -math.inf
    assert_drawn_from(counts_of_first_word(result), log_p.softmax(-1))


def test_whole_captions_have_the_probability_that_is_reported() -> None:
    decoder, features = ToyDecoder(seed=1, sharpness=0.5), make_features(1)
    options = make_options(max_length=2, suppressed_ids=())
    result = sample(decoder, features, options, DRAWS, generator=seeded())
    captions, counts = torch.unique(
        torch.cat([result.tokens[0], result.lengths[0, :, None], result.ended[0, :, None]], 1),
        dim=0,
        return_counts=True,
    )
    assert len(captions) > 20
    model = PlainModel(decoder, features[0])
    for (*words, length, ended), count in zip(captions.tolist(), counts.tolist(), strict=True):
        p = math.exp(model.log_probability(words[:length], bool(ended)))
        if not ended and length == 2:
            p *= 1 - math.exp(model.next(words)[EOS])  # cut off: it drew something else than <eos>
        assert abs(count - DRAWS * p) < 5 * math.sqrt(DRAWS * p) + 1


def test_of_a_sure_decoder_it_is_greedy_search() -> None:
    decoder, features = ToyDecoder(seed=3, sharpness=1e4), make_features(8)
    options = make_options(max_length=7, length_penalty=0.5, no_repeat_ngram=2)
    greedy = greedy_search(decoder, features, options)
    drawn = sample(decoder, features, options, 3, generator=seeded())
    for name in ("tokens", "lengths", "ended", "log_probabilities", "scores"):
        expected = getattr(greedy, name)
        torch.testing.assert_close(getattr(drawn, name), expected.expand(-1, 3, *expected.shape[2:]))


def test_the_generator_decides() -> None:
    decoder, features, options = ToyDecoder(sharpness=0.3), make_features(4), make_options(max_length=8)
    first, again, other = (sample(decoder, features, options, 5, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.scores, again.scores)
    assert not torch.equal(first.tokens, other.tokens)


def test_log_probabilities_are_the_models() -> None:
    decoder, features = ToyDecoder(seed=9, eos_bias=-1), make_features(4)
    options = make_options(max_length=6, length_penalty=1.0)
    result = sample(decoder, features, options, 6, generator=seeded())
    assert torch.all(result.ended.long().diff(dim=1) <= 0)
    for image in range(4):
        model = PlainModel(decoder, features[image])
        for row in range(6):
            length, ended = int(result.lengths[image, row]), bool(result.ended[image, row])
            expected = model.log_probability(result.tokens[image, row, :length].tolist(), ended)
            assert result.log_probabilities[image, row].item() == pytest.approx(expected, abs=1e-5)
            assert result.scores[image, row].item() == pytest.approx(expected / (length + ended), abs=1e-5)


def test_constraints_hold_and_stuck_rows_stay_finite() -> None:
    decoder, features = ToyDecoder(eos_bias=-math.inf), make_features(4)
    options = make_options(max_length=8, no_repeat_ngram=1)
    result = sample(decoder, features, options, 4, generator=seeded())
    assert torch.all(result.lengths == 3)
    assert not result.ended.any()
    assert result.log_probabilities.isfinite().all()
    for words in result.tokens[..., :3].flatten(0, 1).tolist():
        assert set(words) == {A, B, C}
        assert not has_repeat(words, 1)


def test_min_length_holds() -> None:
    options = make_options(max_length=6, min_length=4)
    result = sample(ToyDecoder(eos_bias=3.0), make_features(4), options, 4, generator=seeded())
    assert torch.all(result.lengths >= 4)
