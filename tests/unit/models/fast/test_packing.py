"""Packed words are those of a padded batch without the padding, in the order in which a loop over positions reads."""

from __future__ import annotations

import pytest
import torch

from capdist.models.fast.packing import Packing

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("lengths", "width"),
    [([4, 1, 6, 3, 0, 6], 6), ([4, 1, 6, 3, 0, 6], 9), ([2], 2), ([1, 1, 1], 1), ([0, 0], 3), ([3, 0, 0], 3)],
)
def test_words_are_those_of_a_loop_over_positions_and_captions(lengths: list[int], width: int) -> None:
    packing = Packing.of(torch.tensor(lengths), width, CPU)
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])  # Python's sort keeps the order of equals
    expected = [(row, position) for position in range(width) for row in rows if position < lengths[row]]
    assert packing.rows.tolist() == rows
    assert [divmod(word, width) for word in packing.words.tolist()] == expected
    counts = [sum(length > position for length in lengths) for position in range(width)]
    assert packing.counts == [count for count in counts if count]


def test_the_captions_that_go_on_are_the_first_rows() -> None:
    """A loop can then slice its state, and the words of a position are those rows' words in the same order."""
    lengths, width = [2, 5, 3, 5], 5
    packing = Packing.of(torch.tensor(lengths), width, CPU)
    for position, words in enumerate(packing.words.split(packing.counts)):
        assert words.tolist() == [row * width + position for row in packing.rows[: len(words)].tolist()]


def test_pick_takes_one_value_for_each_word() -> None:
    packing = Packing.of(torch.tensor([1, 3]), 3, CPU)
    values = torch.tensor([[10, 11, 12], [20, 21, 22]])
    assert packing.pick(values).tolist() == [20, 10, 21, 22]


def test_indices_go_to_the_device_and_counts_stay_on_the_host() -> None:
    packing = Packing.of(torch.tensor([1, 3]), 3, torch.device("meta"))
    assert packing.rows.device.type == packing.words.device.type == "meta"
    assert packing.counts == [2, 1, 1]
