"""Words of people that the model's own replace in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from capdist.models.caption_model import CaptionModel
from capdist.models.decoder import Decoder
from capdist.text.vocabulary import IGNORED_LABEL
from capdist.training.objectives import cross_entropy, sample_words
from tests.models import loss_of, tiny_model

WORDS, SAID = 13, 11


def _model(said: int | None = None) -> CaptionModel:
    """A model that says one word whatever it reads, or any at all."""
    model = tiny_model(vocab_size=WORDS, seed=None)
    with torch.no_grad():
        if said is not None:
            model.decoder.head.bias[said] = 99.0
    return model.double().train()


def _captions(rows: int, width: int = 7) -> tuple[Tensor, Tensor, list[int]]:
    lengths = [width - row % 4 for row in range(rows)]
    read = torch.arange(width) < torch.tensor(lengths)[:, None]
    input_ids = torch.where(read, 5, 0)
    input_ids[:, 0] = 1
    return input_ids, torch.where(read, 6, IGNORED_LABEL), lengths


def _read(model: CaptionModel, rows: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the captions, what the decoder read of them in the end, and the loss."""
    input_ids, labels, lengths = _captions(rows)
    features = torch.ones(rows, 4, 6, dtype=torch.float64)
    seen = input_ids

    def rewrite(decoder: Decoder[Any], features: Tensor, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        nonlocal seen
        seen = sample_words(decoder, features, ids, lengths, share=share)
        return seen

    loss = cross_entropy(model(input_ids, lengths, features=features, rewrite=rewrite), labels)
    present = torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]
    return torch.where(present, seen, -1), torch.where(present, input_ids, -1), loss


def test_all_words_but_the_first_are_what_the_model_says() -> None:
    read, given, _ = _read(_model(SAID), 8, 1.0)
    assert torch.equal(read[:, 0], given[:, 0])
    assert torch.equal(read[:, 1:], torch.where(given[:, 1:] >= 0, SAID, -1))


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_share_of_the_words_is(share: float) -> None:
    read, given, _ = _read(_model(SAID), 2000, share)
    later = given[:, 1:] >= 0
    assert (read[:, 1:][later] == SAID).double().mean().item() == pytest.approx(share, abs=0.02)
    assert ((read == SAID) | (read == given)).all()


def test_words_are_drawn_as_often_as_they_are_probable() -> None:
    model = _model()
    read, given, _ = _read(model, 4000, 1.0)
    with torch.no_grad():
        logits, _, _ = model.step(torch.tensor([[1]]), model.init_state(torch.ones(1, 4, 6, dtype=torch.float64)))
    chances = logits.flatten().softmax(dim=0)
    drawn = torch.bincount(read[:, 1], minlength=WORDS) / len(read)
    torch.testing.assert_close(drawn.double(), chances, atol=0.03, rtol=0)


def test_the_loss_is_that_of_the_words_read() -> None:
    model = _model(SAID)
    _, _, loss = _read(model, 8, 1.0)
    input_ids, labels, _ = _captions(8)
    input_ids[:, 1:] = SAID
    features = torch.ones(8, 4, 6, dtype=torch.float64)
    expected = loss_of(model, input_ids, labels, features=features)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.requires_grad
