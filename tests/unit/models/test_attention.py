"""What every attention of the table must do, in float64.

Shapes: B images, R rows of an image, N cells, C channels, H state width.
"""

from __future__ import annotations

import copy
import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from capdist.models.attention import ATTENTIONS, Attention
from capdist.recipe.decoders import SoftAttentionSection

IMAGES, ROWS, CELLS, CHANNELS, HIDDEN = 2, 3, 5, 6, 8

pytestmark = pytest.mark.parametrize("name", list(ATTENTIONS))


def _attention(name: str) -> Attention:
    torch.manual_seed(0)
    return ATTENTIONS[name](CHANNELS, HIDDEN, 7).double()


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(IMAGES, CELLS, CHANNELS, generator=generator).double()
    return features, torch.randn(IMAGES, ROWS, HIDDEN, generator=generator).double()


def test_the_recipe_can_name_it(name: str) -> None:
    assert name in get_args(SoftAttentionSection.model_fields["attention"].annotation)


def test_contexts_are_the_weighted_means_of_the_features(name: str) -> None:
    attention, (features, hidden) = _attention(name), _inputs()
    contexts, weights = attention.for_search(attention.memory(features))(attention.query(hidden))
    for image in range(IMAGES):
        keys = attention.keys(features[image : image + 1])
        for row in range(ROWS):
            scores = attention.scores(keys, attention.query(hidden[image, row])[None])[0].tolist()
            total = sum(map(math.exp, scores))
            expected = [math.exp(score) / total for score in scores]
            assert weights[image, row].tolist() == pytest.approx(expected, rel=1e-9)
            mean = sum(w * features[image, cell] for cell, w in enumerate(expected))
            torch.testing.assert_close(contexts[image, row], mean)


def test_training_looks_as_search_does_and_has_its_gradients(name: str) -> None:
    """Rows are read from the longest caption to the shortest; at the second step only four are left."""
    fast, (features, hidden) = _attention(name), _inputs()
    plain, rows = copy.deepcopy(fast), torch.tensor([4, 0, 5, 2, 1, 3])
    look = fast.for_training(fast.memory(features), rows)
    flat = hidden.flatten(0, 1)[rows]
    steps = [look(fast.query(flat[:count])) for count in (6, 4)]
    reference = plain.for_search(plain.memory(features))(plain.query(hidden))
    for contexts, weights in steps:
        count = len(contexts)
        torch.testing.assert_close(contexts, reference[0].flatten(0, 1)[rows[:count]], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weights, reference[1].flatten(0, 1)[rows[:count]], rtol=1e-12, atol=1e-12)
    gaze = torch.randn(6, CHANNELS, generator=torch.Generator().manual_seed(2)).double()
    sum((contexts * gaze[: len(contexts)]).sum() for contexts, _ in steps).backward()
    expected = reference[0].flatten(0, 1)[rows]
    sum((expected[:count] * gaze[:count]).sum() for count in (6, 4)).backward()
    for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_selected_images_keep_their_memory(name: str) -> None:
    attention, (features, hidden) = _attention(name), _inputs()
    kept = torch.tensor([1])
    memory = attention.select(attention.memory(features), kept)
    contexts, _ = attention.for_search(memory)(attention.query(hidden[kept]))
    expected, _ = attention.for_search(attention.memory(features))(attention.query(hidden))
    torch.testing.assert_close(contexts, expected[kept])
