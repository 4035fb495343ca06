"""Beam search against enumeration and against a plain search of one image at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toy_decoder import (
    BOS,
    EOS,
    PAD,
    SUPPRESSED,
    A,
    B,
    PlainModel,
    ToyDecoder,
    enumerate_captions,
    has_repeat,
    make_features,
    make_options,
    plain_beam_search,
)

from capdist.decoding import SearchResult, beam_search, greedy_search, search
from capdist.decoding.search import STEPS_BETWEEN_LOOKS
from capdist.errors import NumericsError, UsageError

ALL = 500  # more beams than there are continuations at any step


def words_of(result: SearchResult, image: int, candidate: int) -> list[int]:
    return result.tokens[image, candidate, : result.lengths[image, candidate]].tolist()


def assert_same(result: SearchResult, image: int, expected: list) -> None:
    assert [words_of(result, image, i) for i in range(len(expected))] == [c.words for c in expected]
    assert result.ended[image, : len(expected)].tolist() == [c.ended for c in expected]
    for values, name in ((result.log_probabilities, "log_probability"), (result.scores, "score")):
        wanted = [getattr(c, name) for c in expected]
        assert values[image, : len(expected)].tolist() == pytest.approx(wanted, abs=1e-5, rel=0)
    assert_empty(result, slice(image, image + 1), slice(len(expected), None))


def assert_empty(result: SearchResult, images: slice, candidates: slice) -> None:
    assert torch.all(result.log_probabilities[images, candidates] == -math.inf)
    assert torch.all(result.scores[images, candidates] == -math.inf)
    assert torch.all(result.tokens[images, candidates] == PAD)
    assert torch.all(result.lengths[images, candidates] == 0)
    assert not result.ended[images, candidates].any()
    if result.attention is not None:
        assert torch.all(result.attention[images, candidates] == 0)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("min_length", [0, 3])
def test_a_wide_beam_finds_the_best_of_all_captions(alpha: float, min_length: int) -> None:
    decoder, features = ToyDecoder(seed=3), make_features(3)
    options = make_options(max_length=4, length_penalty=alpha, min_length=min_length)
    options = options.model_copy(update={"beam_size": ALL})  # wider than any user may ask for
    result = beam_search(decoder, features, options)
    for image in range(3):
        expected = enumerate_captions(PlainModel(decoder, features[image]), options)
        assert len(expected) == sum(3**n for n in range(min_length, 5))
        assert_same(result, image, expected)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"length_penalty": 1.0, "max_length": 7},
        {"min_length": 3, "no_repeat_ngram": 2, "length_penalty": 0.7},
        {"no_repeat_ngram": 1, "min_length": 3, "max_length": 4},
        {"max_length": 1},
    ],
)
def test_a_batch_gives_what_a_plain_search_of_each_image_gives(width: int, seed: int, changes: dict) -> None:
    decoder, features = ToyDecoder(seed=seed, eos_bias=-1.0), make_features(6, seed)
    options = make_options(beam_size=width, **changes)
    result = beam_search(decoder, features, options)
    for image in range(6):
        assert_same(result, image, plain_beam_search(PlainModel(decoder, features[image]), options))


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    decoder, features = ToyDecoder(seed=5), make_features(5)
    options = make_options(beam_size=3, length_penalty=0.8, max_length=8)
    together = beam_search(decoder, features, options, return_attention=True)
    for image in range(5):
        alone = beam_search(decoder, features[image : image + 1], options, return_attention=True)
        for name in ("tokens", "lengths", "ended"):
            assert torch.equal(getattr(together, name)[image], getattr(alone, name)[0])
        torch.testing.assert_close(together.log_probabilities[image], alone.log_probabilities[0])
        torch.testing.assert_close(together.attention[image], alone.attention[0])


@pytest.mark.parametrize("steps_between_looks", [1, 2, 3])
def test_decided_images_leave_the_batch_and_come_back_in_their_place(
    steps_between_looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STEPS_BETWEEN_LOOKS, "cpu", steps_between_looks)
    decoder, features, options = ToyDecoder(seed=1), make_features(24), make_options(beam_size=3, max_length=9)
    sizes = []
    step = decoder.step

    def counted_step(tokens: Any, state: Any) -> Any:
        sizes.append(len(tokens))
        return step(tokens, state)

    decoder.step = counted_step
    result = beam_search(decoder, features, options, return_attention=True)
    assert sizes[0] == 24
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    for image in range(24):
        alone = beam_search(ToyDecoder(seed=1), features[image : image + 1], options, return_attention=True)
        for name in ("tokens", "lengths", "log_probabilities", "scores", "ended", "attention"):
            torch.testing.assert_close(getattr(result, name)[image], getattr(alone, name)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("eos_bias", [0.0, -4.0, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ngram", [0, 1, 2])
def test_a_beam_of_one_is_greedy_search(alpha: float, eos_bias: float, dtype: torch.dtype, ngram: int) -> None:
    # Coarse bfloat16 logits have ties, which must break alike.
    decoder = ToyDecoder(seed=2, eos_bias=eos_bias, dtype=dtype, sharpness=0.02 if dtype == torch.bfloat16 else 2)
    features = make_features(16)
    options = make_options(beam_size=1, length_penalty=alpha, max_length=8, no_repeat_ngram=ngram)
    beam, greedy, chosen = (f(decoder, features, options, True) for f in (beam_search, greedy_search, search))
    for name in SearchResult.__dataclass_fields__:
        assert torch.equal(getattr(beam, name), getattr(greedy, name)), name
        assert torch.equal(getattr(chosen, name), getattr(greedy, name)), name


def test_a_caption_that_never_ends_comes_back_not_ended() -> None:
    decoder, features = ToyDecoder(eos_bias=-math.inf), make_features(4)
    result = beam_search(decoder, features, make_options(beam_size=3, length_penalty=1.0, max_length=5))
    assert not result.ended.any()
    assert torch.all(result.lengths == 5)
    assert result.log_probabilities.isfinite().all()
    assert torch.all(result.scores.diff(dim=1) <= 0)
    torch.testing.assert_close(result.scores, result.log_probabilities / 5)


def test_captions_that_ended_come_before_those_cut_off() -> None:
    features = make_features(40)
    result = beam_search(ToyDecoder(seed=1, eos_bias=-3), features, make_options(beam_size=5, max_length=3))
    assert torch.all(result.ended.long().diff(dim=1) <= 0)
    assert (result.ended.any(1) & ~result.ended.all(1)).any(), "no image has both kinds"
    captions = [[(*words_of(result, b, k),) for k in range(5)] for b in range(40)]
    assert all(len(set(row)) == 5 for row in captions), "a caption came back twice"


def test_a_caption_without_an_allowed_word_left_comes_back_as_it_is() -> None:
    # Three words, none twice, and no end: every beam is stuck after the third.
    options = make_options(beam_size=3, max_length=8, min_length=5, no_repeat_ngram=1)
    decoder, features = ToyDecoder(), make_features(4)
    result = beam_search(decoder, features, options)
    assert torch.all(result.lengths == 3)
    assert not result.ended.any()
    assert result.log_probabilities.isfinite().all()
    for image in range(4):
        assert_same(result, image, plain_beam_search(PlainModel(decoder, features[image]), options))


def test_a_model_without_any_possible_token_gives_empty_captions() -> None:
    class Silent(ToyDecoder):
        def step(self, tokens, state):
            logits, attention, state = super().step(tokens, state)
            return torch.full_like(logits, -math.inf), attention, state

    for find in (greedy_search, beam_search):
        result = find(Silent(), make_features(2), make_options(length_penalty=1.0), True)
        captions = result.log_probabilities > -math.inf
        assert_empty(result, slice(None), slice(int(captions[0].sum()), None))
        assert torch.all(result.lengths == 0)
        assert not result.ended.any()
        assert torch.all(result.scores[captions] == 0)


@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("ngram", [0, 1, 2, 3])
@pytest.mark.parametrize("min_length", [0, 2, 9])
def test_constraints_hold_in_every_candidate(width: int, ngram: int, min_length: int) -> None:
    options = make_options(beam_size=width, max_length=9, min_length=min_length, no_repeat_ngram=ngram)
    result = search(ToyDecoder(seed=7), make_features(10), options)
    assert torch.all((result.lengths <= 9) & ((result.lengths >= min_length) | ~result.ended))
    for image in range(10):
        for candidate in range(width):
            words = words_of(result, image, candidate)
            assert not set(words) & {*SUPPRESSED, EOS}
            assert not (ngram and has_repeat(words, ngram))
            assert torch.all(result.tokens[image, candidate, len(words) :] == PAD)


@pytest.mark.parametrize("width", [1, 4])
def test_attention_and_log_probability_are_those_of_reading_the_caption(width: int) -> None:
    decoder, features = ToyDecoder(seed=4, eos_bias=-2), make_features(6)
    result = search(decoder, features, make_options(beam_size=width, max_length=7), return_attention=True)
    for image in range(6):
        words = words_of(result, image, 0)
        state, total = decoder.init_state(features[image : image + 1]), 0.0
        for position, token in enumerate([BOS, *words]):
            logits, attention, state = decoder.step(torch.tensor([[token]]), state)
            if position < len(words):
                total += logits[0, 0].log_softmax(-1)[words[position]]
                torch.testing.assert_close(result.attention[image, 0, position], attention[0, 0])
            elif result.ended[image, 0]:
                total += logits[0, 0].log_softmax(-1)[EOS]
        assert torch.all(result.attention[image, 0, len(words) :] == 0)
        torch.testing.assert_close(result.log_probabilities[image, 0], total)
    assert search(decoder, features, make_options(beam_size=width)).attention is None


def test_candidates_that_do_not_exist_are_empty() -> None:
    # Three words, no end, at most two of them: 9 captions for 20 beams.
    options = make_options(beam_size=20, max_length=2)
    result = beam_search(ToyDecoder(eos_bias=-math.inf), make_features(3), options, return_attention=True)
    assert torch.all(result.log_probabilities[:, :9] > -math.inf)
    assert_empty(result, slice(None), slice(9, None))


class SlowStarter(ToyDecoder):
    """Ends at once, or after `B`, or is caught in `A A A ...`: a poor start that gets better on the way."""

    def __init__(self, p_end: float, p_b: float) -> None:
        super().__init__()
        self.table = torch.zeros(6, 6)
        self.table[BOS, EOS], self.table[BOS, B], self.table[BOS, A] = p_end, p_b, 1 - p_end - p_b
        self.table[B, EOS], self.table[A, A], self.table[A, EOS] = 1.0, 0.9, 0.1

    def init_state(self, features):
        state = super().init_state(features)
        return state._replace(tables=self.table.log().expand(state.tables.shape))


def test_search_stops_as_soon_as_no_beam_can_get_into_the_pool() -> None:
    # After two steps the pool holds probabilities 0.5 and 0.26; the beam `A A` has 0.24 * 0.9 and can only fall.
    decoder = SlowStarter(0.5, 0.26)
    beam_search(decoder, make_features(1), make_options(beam_size=2, max_length=30))
    assert decoder.steps == 2
    # With 0.2 as its second, `A A` (0.216) could still get in; `A A A` (0.194) cannot.
    decoder = SlowStarter(0.5, 0.26)
    decoder.table[BOS, B] = 0.2
    beam_search(decoder, make_features(1), make_options(beam_size=2, max_length=30))
    assert decoder.steps == 3


def test_search_stops_when_no_beam_can_win_any_more() -> None:
    features = make_features(4)
    eager, shy = ToyDecoder(eos_bias=20.0), ToyDecoder(eos_bias=-math.inf)
    for find in (greedy_search, beam_search):
        result = find(eager, features, make_options(beam_size=2, max_length=30))
        assert result.ended.all()
        find(shy, features, make_options(beam_size=2, max_length=30))
    assert eager.steps <= 1 + 3, "greedy search needs one step, two beams hardly more"
    assert shy.steps == 2 * 31


def test_a_long_caption_can_still_get_into_a_full_pool() -> None:
    # The pool is full after the second step, when log p / length is -0.60 for `B` and -0.80 for `A A`.
    decoder, features = SlowStarter(0.6, 0.3), make_features(1)
    options = make_options(beam_size=2, max_length=9, length_penalty=1.0)
    result = beam_search(decoder, features, options)
    assert [words_of(result, 0, candidate) for candidate in (0, 1)] == [[], [A] * 9]
    assert_same(result, 0, plain_beam_search(PlainModel(decoder, features[0]), options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    decoder, features = ToyDecoder(seed=8, dtype=dtype), make_features(6)
    options = make_options(beam_size=3, max_length=9, length_penalty=1.0)
    result = beam_search(decoder, features, options, return_attention=True)
    assert result.log_probabilities.dtype == result.scores.dtype == result.attention.dtype == torch.float32
    for image in range(6):
        assert_same(result, image, plain_beam_search(PlainModel(decoder, features[image]), options))


def test_no_image_and_one_image_are_batches_too() -> None:
    result = beam_search(ToyDecoder(), make_features(0), make_options(beam_size=3), return_attention=True)
    assert result.tokens.shape == (0, 3, 5)
    for options in (make_options(beam_size=3), make_options(beam_size=3, consensus=4.0)):
        assert search(ToyDecoder(), make_features(0), options, return_attention=True).tokens.shape == (0, 3, 5)
        assert search(ToyDecoder(), make_features(1), options).scores.shape == (1, 3)


def test_a_search_records_no_gradient() -> None:
    features = make_features(2).requires_grad_()
    assert not search(ToyDecoder(), features, make_options(), True).log_probabilities.requires_grad


def test_mistakes_of_model_and_ids_are_named() -> None:
    class Broken(ToyDecoder):
        def step(self, tokens, state):
            logits, attention, state = super().step(tokens, state)
            logits[-1, -1, 3] = math.nan
            return logits, attention, state

    for find in (greedy_search, beam_search):
        with pytest.raises(NumericsError, match="NaN"):
            find(Broken(), make_features(2), make_options())
        with pytest.raises(UsageError, match=r"\[9\] outside the decoder's vocabulary; ids must be below 6"):
            find(ToyDecoder(), make_features(2), make_options(suppressed_ids=(0, 9)))
