"""Options refuse what makes no sense, all at once; n-grams are forbidden as counting says."""

from __future__ import annotations

import math

import pytest
import torch
from toy_decoder import has_repeat

from capdist.decoding import SearchOptions
from capdist.decoding.constraints import forbid_repeats
from capdist.errors import UsageError


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"beam_size": 0}, r"^beam_size: must be greater than or equal to 1, found 0 \(int\)$"),
        ({"beam_size": 2.0}, r"^beam_size: must be integer, found 2\.0 \(float\)$"),
        ({"beam_size": True}, r"^beam_size: must be integer, found True \(bool\)$"),
        ({"max_length": 0}, r"^max_length: must be greater than or equal to 1, found 0 \(int\)$"),
        ({"min_length": 31}, r"^min_length: 31 must be at most max_length \(30\)$"),
        ({"min_length": -1}, r"^min_length: must be greater than or equal to 0, found -1 \(int\)$"),
        ({"length_penalty": -0.5}, r"^length_penalty: must be greater than or equal to 0, found -0\.5 \(float\)$"),
        ({"length_penalty": math.nan}, r"^length_penalty: must be"),
        ({"consensus": 0.0}, r"^consensus: must be greater than 0, found 0\.0 \(float\)$"),
        ({"consensus": math.inf}, r"^consensus: must be a finite number, found inf \(float\)$"),
        ({"consensus": True}, r"^consensus: must be number, found True \(bool\)$"),
        ({"length_penalty": "1"}, r"^length_penalty: must be number, found '1' \(str\)$"),
        ({"no_repeat_ngram": -2}, r"^no_repeat_ngram: must be greater than or equal to 0, found -2 \(int\)$"),
        ({"eos_id": -1}, r"^eos_id: must be greater than or equal to 0, found -1 \(int\)$"),
        ({"suppressed_ids": [0]}, r"^suppressed_ids: must be tuple, found \[0\] \(list\)$"),
        ({"suppressed_ids": (0, -3)}, r"^suppressed_ids: must be greater than or equal to 0, found -3 \(int\)$"),
        ({"suppressed_ids": (0, 2)}, r"^suppressed_ids: \(0, 2\) must leave out eos_id \(2\)$"),
    ],
)
def test_a_mistake_names_field_value_and_what_is_right(changes: dict, mistake: str) -> None:
    with pytest.raises(UsageError, match=mistake):
        SearchOptions(**{"bos_id": 1, "eos_id": 2, **changes})


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(UsageError) as error:
        SearchOptions(bos_id=1, eos_id=2, beam_size=0, no_repeat_ngram=-1, length_penalty=-1)
    assert len(error.value.lines) == 3


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 6, 9])
def test_exactly_the_tokens_that_repeat_are_forbidden(size: int, length: int) -> None:
    vocabulary = 3
    words = torch.randint(vocabulary, (20, 4, length), generator=torch.Generator().manual_seed(size))
    # Words already repeat themselves here, which a search never lets happen: only the new n-gram counts.
    log_p = forbid_repeats(torch.full((20, 4, vocabulary), -0.5), words, size)
    for image in range(20):
        for row in range(4):
            said = words[image, row].tolist()
            for token in range(vocabulary):
                last = (*said, token)[length + 1 - size :] if size else ()
                seen = {tuple(said[i : i + size]) for i in range(length - size + 1)}
                expected = bool(size) and len(last) == size and last in seen
                assert (log_p[image, row, token] == -math.inf) == expected


def test_has_repeat_counts() -> None:
    assert has_repeat([1, 2, 1, 2], 2)
    assert not has_repeat([1, 2, 1], 2)
