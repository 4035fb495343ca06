"""capdist against the textbook that it is measured against: the same loss, gradients and captions."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from capdist.benchmark import textbook
from capdist.decoding import SearchOptions, search
from capdist.models.caption_model import CaptionModel
from capdist.text.vocabulary import IGNORED_LABEL
from capdist.training.objectives import doubly_stochastic
from tests.models import loss_of, read, tiny_model

CHANNELS, VOCABULARY, IMAGES, CAPTIONS = 24, 40, 3, 5
PAD, BOS, EOS = 0, 1, 2


def make_model(
    grid: int | None, dtype: torch.dtype = torch.float64, gate: bool = True, tied: bool = False
) -> CaptionModel:
    layers: OrderedDict[str, nn.Module] = OrderedDict(layer1=nn.Conv2d(3, CHANNELS, 4, stride=4), act=nn.ReLU())
    model = tiny_model(
        channels=CHANNELS, vocab_size=VOCABULARY, layers=layers, encoder={"grid": grid}, seed=5, gate=gate,
        tie_weights=tied, embed_size=12 if tied else 10, hidden_size=12, attention_size=14,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(3)
    return model.to(dtype)


def random_captions() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    lengths = torch.randint(1, 9, (IMAGES * CAPTIONS,), generator=generator)
    width = int(lengths.max())
    input_ids, labels = (torch.randint(3, VOCABULARY, (len(lengths), width), generator=generator) for _ in range(2))
    input_ids[:, 0] = BOS
    labels[torch.arange(width) >= lengths[:, None]] = IGNORED_LABEL
    return input_ids, labels, lengths


@pytest.mark.parametrize("options", [{}, {"gate": False}, {"tied": True}], ids=str)
@pytest.mark.parametrize("grid", [None, 14], ids=["7x7", "14x14"])
def test_loss_and_every_gradient_are_the_textbooks(grid: int | None, options: dict[str, bool]) -> None:
    model = make_model(grid, **options)
    plain = textbook.decoder_like(model.decoder)
    photos = torch.randn(IMAGES, 3, 28, 28, generator=torch.Generator().manual_seed(7)).double()
    input_ids, labels, lengths = random_captions()
    loss = loss_of(model, input_ids, labels, pixel_values=photos)
    loss.backward()

    # At 28 pixels this backbone has a map of 7x7 cells; the textbook pools it up to 14x14 in any case.
    features = textbook.Encoder(model.encoder.network)(photos).detach().repeat_interleave(CAPTIONS, dim=0)
    assert features.shape == (IMAGES * CAPTIONS, 196, CHANNELS)
    expected = textbook.caption_loss(plain, features, input_ids, labels, lengths)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    own = dict(model.decoder.named_parameters(remove_duplicate=False))
    names = textbook.parameter_names(plain)
    assert set(names.values()) == set(own)
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        if name == "attention.full_att.bias":
            assert parameter.grad.abs() < 1e-12
            continue
        assert parameter.grad.abs().max() > 1e-3, name
        torch.testing.assert_close(own[names[name]].grad, parameter.grad, rtol=1e-9, atol=1e-9)


def test_penalty_of_14x14_cells_is_computed_on_7x7() -> None:
    model, photos = make_model(14), torch.randn(IMAGES, 3, 28, 28).double()
    input_ids, labels, lengths = random_captions()
    features = model.encode(photos)
    assert features.shape == (IMAGES, 49, CHANNELS)
    loss = doubly_stochastic(read(model, input_ids, labels, features=features), labels)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.decoder.named_parameters() if p.grad is not None}

    model.zero_grad()
    pooled = textbook.Encoder(model.encoder.network)(photos).detach()
    looked = model.decoder.read(pooled, input_ids, lengths.tolist()).attention
    assert looked.shape == (IMAGES * CAPTIONS, 196)
    expected = ((1 - looked) ** 2).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert len(gradients) > 10
    for name, parameter in model.decoder.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", [None, 14], ids=["7x7", "14x14"])
@pytest.mark.parametrize("beam_size", [1, 3, 5])
def test_captions_and_log_probabilities_are_the_textbooks(grid: int | None, beam_size: int) -> None:
    model = make_model(grid, torch.float32).eval()
    with torch.no_grad():
        model.decoder.head.weight *= 3  # as sure of itself as a trained network, with captions that end
        model.decoder.head.bias[EOS] += 2
    plain = textbook.decoder_like(model.decoder)
    generator = torch.Generator().manual_seed(8)
    photos = torch.randn(30, 3, 28, 28, generator=generator) + 3 * torch.randn(30, 3, 1, 1, generator=generator)
    options = SearchOptions(
        bos_id=BOS, eos_id=EOS, pad_id=PAD, suppressed_ids=(PAD, BOS), beam_size=beam_size, max_length=12, min_length=2
    )
    result = search(model, model.encode(photos), options)
    features = textbook.Encoder(model.encoder.network)(photos)
    found = set()
    for image in range(len(photos)):
        words, log_probability = textbook.beam_search(plain, features[image : image + 1], options)
        length = int(result.lengths[image, 0])
        assert result.tokens[image, 0, :length].tolist() == words
        assert result.log_probabilities[image, 0].item() == pytest.approx(log_probability, abs=1e-4, rel=1e-5)
        found.add(tuple(words))
    assert len(found) > 10
    assert len({len(words) for words in found}) >= 3
