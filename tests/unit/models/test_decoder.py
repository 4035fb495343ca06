"""Attention, decoder and loss against the same network written the slow, plain way, caption by caption.

Shapes: B images, R captions an image, T words, N cells, C channels.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from capdist.models.attention import AdditiveAttention
from capdist.models.caption_model import CaptionModel
from capdist.text.vocabulary import IGNORED_LABEL
from capdist.training.objectives import cross_entropy, doubly_stochastic, word_presence
from tests.models import loss_of, read, tiny_model
from tests.unit.models.plain_decoder import plain_forward

PAD, BOS, EOS = 0, 1, 2
VOCABULARY, CHANNELS, CELLS = 11, 5, 4
LENGTHS = ((4, 1, 6), (3, 0, 6))  # words of each caption, by image; one row holds none


def _build(
    *,
    gate: bool = True,
    tied: bool = False,
    projection: int | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> CaptionModel:
    model = tiny_model(
        channels=CHANNELS, vocab_size=VOCABULARY, projection=projection, embed_size=8 if tied else 6, attention_size=7,
        dropout=dropout, gate=gate, tie_weights=tied, seed=1,
    ).to(dtype)  # fmt: skip
    with torch.no_grad():  # large enough for the attention and the gates to differ from word to word
        for parameter in model.decoder.parameters():
            parameter.mul_(3)
    return model


def _features(dtype: torch.dtype = torch.float64, images: int = len(LENGTHS)) -> Tensor:
    return torch.randn(images, CELLS, CHANNELS, generator=torch.Generator().manual_seed(2)).to(dtype)


def _captions(lengths: Sequence[Sequence[int]] = LENGTHS, extra_padding: int = 0) -> tuple[Tensor, Tensor]:
    """Return input_ids and labels (B·R, T) of random captions of these lengths."""
    generator = torch.Generator().manual_seed(4)
    flat = [length for row in lengths for length in row]
    input_ids = torch.full((len(flat), max(flat) + extra_padding), PAD)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, length in enumerate(flat):
        words = torch.randint(3, VOCABULARY, (length,), generator=generator)
        if length:
            words[-1] = EOS
            labels[row, :length] = words
            input_ids[row, 0] = BOS
            input_ids[row, 1:length] = words[:-1]
    return input_ids, labels


def _plain_forward(model: CaptionModel, features: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (rows, T, V) and attention (rows, T, N) of the plain network."""
    if isinstance(model.projection, nn.Linear):
        convolution = model.projection.weight[:, :, None, None]
        feature_map = features.transpose(1, 2).unflatten(2, (2, 2))
        feature_map = nn.functional.conv2d(feature_map, convolution, model.projection.bias)
        features = feature_map.flatten(2).transpose(1, 2)
    return plain_forward(model.decoder, features, input_ids)


def _fast_forward(model: CaptionModel, features: Tensor, input_ids: Tensor, lengths: list[int]) -> tuple[Any, Tensor]:
    """Return logits by (row, position), and the attention of each row summed over its words (rows, N)."""
    reading = model.decoder.read(model.projection(features), input_ids, lengths)
    places = [divmod(word, input_ids.shape[1]) for word in reading.words.tolist()]
    assert sorted(places) == [(row, position) for row, length in enumerate(lengths) for position in range(length)]
    assert reading.attention is not None
    return dict(zip(places, reading.logits, strict=True)), reading.attention


def _losses(model: CaptionModel, input_ids: Tensor, labels: Tensor, smoothing: float = 0.0, **inputs: Any) -> Tensor:
    """Return cross-entropy, penalty and, with a word head, word presence."""
    output = read(model, input_ids, labels, **inputs)
    losses = [cross_entropy(output, labels, label_smoothing=smoothing), doubly_stochastic(output, labels)]
    return torch.stack([*losses, *([word_presence(output, labels)] if model.word_head is not None else [])])


VARIANTS = [
    {"gate": gate, "tied": tied, "projection": projection}
    for gate, tied, projection in itertools.product((True, False), (False, True), (None, 3))
]


@pytest.mark.parametrize("cells", [1, 6])
@pytest.mark.parametrize("rows", [1, 3])
def test_attention_is_that_of_a_triple_loop(rows: int, cells: int) -> None:
    torch.manual_seed(0)
    attention = AdditiveAttention(CHANNELS, 8, 7).double()
    features, hidden = torch.randn(2, cells, CHANNELS).double(), torch.randn(2, rows, 8).double()
    context, weights = attention.for_search(attention.memory(features))(attention.query(hidden))
    key, query = ((m.weight.tolist(), m.bias.tolist()) for m in (attention.key, attention.query))
    score = attention.score.weight[0].tolist()  # a bias, if there is one, falls out of the softmax
    assert weights.shape == (2, rows, cells)
    assert context.shape == (2, rows, CHANNELS)
    for image, row in itertools.product(range(2), range(rows)):
        energies = []
        for cell in range(cells):
            energy = 0.0
            for unit in range(7):
                looked_for = query[1][unit] + sum(
                    w * h for w, h in zip(query[0][unit], hidden[image, row].tolist(), strict=True)
                )
                found = key[1][unit] + sum(
                    w * f for w, f in zip(key[0][unit], features[image, cell].tolist(), strict=True)
                )
                energy += score[unit] * math.tanh(looked_for + found)
            energies.append(energy)
        total = sum(map(math.exp, energies))
        for cell in range(cells):
            assert weights[image, row, cell].item() == pytest.approx(math.exp(energies[cell]) / total, rel=1e-12)
        for channel in range(CHANNELS):
            expected = sum(
                math.exp(energies[cell]) / total * features[image, cell, channel].item() for cell in range(cells)
            )
            assert context[image, row, channel].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("extra_padding", [0, 3])
def test_whole_captions_and_gradients_are_those_of_the_plain_network(
    variant: dict[str, Any], extra_padding: int
) -> None:
    fast = _build(**variant)
    plain = copy.deepcopy(fast)
    input_ids, _ = _captions(extra_padding=extra_padding)
    lengths = [length for row in LENGTHS for length in row]
    features, plain_features = _features().requires_grad_(), _features().requires_grad_()
    logits, looked = _fast_forward(fast, features, input_ids, lengths)
    plain_logits, plain_looked = _plain_forward(plain, plain_features, input_ids)

    for (row, position), values in logits.items():
        torch.testing.assert_close(values, plain_logits[row, position], rtol=1e-10, atol=1e-10)
    expected = torch.stack([plain_looked[row, :length].sum(dim=0) for row, length in enumerate(lengths)])
    torch.testing.assert_close(looked, expected, rtol=1e-10, atol=1e-10)

    weights = torch.randn(len(lengths), input_ids.shape[1], VOCABULARY, generator=torch.Generator().manual_seed(8))
    gaze = torch.randn(looked.shape, generator=torch.Generator().manual_seed(9)).double()
    (sum((values * weights[place]).sum() for place, values in logits.items()) + (looked * gaze).sum()).backward()
    (sum((plain_logits[place] * weights[place]).sum() for place in logits) + (expected * gaze).sum()).backward()
    torch.testing.assert_close(features.grad, plain_features.grad, rtol=1e-10, atol=1e-10)
    expected_gradients = {name: p.grad for name, p in plain.named_parameters() if not name.startswith("encoder.")}
    assert len(expected_gradients) >= 15
    for name, parameter in fast.named_parameters():
        if not name.startswith("encoder."):
            gradient = expected_gradients[name]
            assert gradient.abs().max() > 1e-3, name
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_steps_add_up_to_whole_captions(variant: dict[str, Any]) -> None:
    model = _build(**variant).eval()
    input_ids, _ = _captions(((5, 5, 5), (5, 5, 5)))
    logits, looked = _fast_forward(model, _features(), input_ids, [5] * 6)
    state = model.init_state(_features())
    state = model.reorder(state, torch.zeros(2, 3, dtype=torch.long))
    total = torch.zeros(2, 3, CELLS).double()
    for position in range(5):
        step_logits, weights, state = model.step(input_ids[:, position].view(2, 3), state)
        expected = torch.stack([logits[row, position] for row in range(6)]).view(2, 3, VOCABULARY)
        torch.testing.assert_close(step_logits, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3).double())
        total += weights
    torch.testing.assert_close(total, looked.view(2, 3, CELLS), rtol=1e-10, atol=1e-10)


def test_search_state_never_repeats_features() -> None:
    model = _build(projection=3)
    state = model.init_state(_features())
    assert state.hidden.shape == state.cell.shape == (2, 1, 8)
    for rows in (1, 4, 2):
        state = model.reorder(state, torch.zeros(2, rows, dtype=torch.long))
        before = state
        logits, weights, state = model.step(torch.full((2, rows), BOS), state)
        assert logits.shape == (2, rows, VOCABULARY)
        assert weights.shape == (2, rows, CELLS)
        assert state.hidden.shape == state.cell.shape == (2, rows, 8)
        assert state.memory is before.memory
        assert [values.shape for values in state.memory] == [(2, CELLS, 3), (2, CELLS, 7)]


def test_reorder_takes_each_images_own_rows() -> None:
    model = _build()
    hidden, cell = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 8).double()
    start = model.init_state(_features())
    state = replace(start, hidden=hidden, cell=cell)
    parents = [[2, 2, 0, 1], [0, 1, 1, 2]]
    moved = model.reorder(state, torch.tensor(parents))
    for image, row in itertools.product(range(2), range(4)):
        assert torch.equal(moved.hidden[image, row], hidden[image, parents[image][row]])
        assert torch.equal(moved.cell[image, row], cell[image, parents[image][row]])
    assert torch.equal(state.hidden, hidden)  # the old state is as it was


def test_rows_of_an_image_do_not_see_each_other() -> None:
    model = _build().eval()
    state = model.reorder(model.init_state(_features()), torch.zeros(2, 2, dtype=torch.long))
    first, _, _ = model.step(torch.tensor([[3, 4], [5, 6]]), state)
    second, _, _ = model.step(torch.tensor([[3, 9], [9, 6]]), state)
    same = torch.tensor([[True, False], [False, True]])
    assert torch.equal(first[same], second[same])
    assert not torch.isclose(first[~same], second[~same]).all(dim=-1).any()


def test_dropout_is_on_word_vectors_and_on_the_state_before_the_head() -> None:
    """With everything dropped the word does not matter and the head gives its bias; in evaluation nothing is."""
    model = _build(dtype=torch.float32).train()
    model.decoder.dropout.p = 1.0
    state = model.init_state(_features(torch.float32))
    tokens = torch.tensor([[3], [4]]), torch.tensor([[5], [6]])
    (logits, _, after), (_, _, other) = (model.step(words, state) for words in tokens)
    assert torch.equal(logits, model.decoder.head.bias.expand_as(logits))
    assert torch.equal(after.hidden, other.hidden)
    assert after.hidden.abs().min() > 0
    model.eval()
    (logits, _, after), (_, _, other) = (model.step(words, state) for words in tokens)
    assert not torch.allclose(after.hidden, other.hidden)
    assert torch.equal(model.step(tokens[0], state)[0], logits)


def _plain_loss(
    model: CaptionModel, features: Tensor, input_ids: Tensor, labels: Tensor, smoothing: float
) -> tuple[float, float]:
    """Return -log p of all words, smoothed as torch documents it, and the penalty of equation 14, in loops."""
    logits, looked = _plain_forward(model, features, input_ids)
    total = penalty = 0.0
    for row in range(len(labels)):
        seen = [0.0] * looked.shape[2]
        words = [label for label in labels[row].tolist() if label != IGNORED_LABEL]
        for position, word in enumerate(words):
            values = logits[row, position].tolist()
            log_z = math.log(sum(map(math.exp, values)))
            log_p = [value - log_z for value in values]
            total -= (1 - smoothing) * log_p[word] + smoothing / len(values) * sum(log_p)
            seen = [s + w for s, w in zip(seen, looked[row, position].tolist(), strict=True)]
        if words:
            penalty += sum((1 - s) ** 2 for s in seen)
    return total, penalty


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("lengths", [LENGTHS, ((1,), (1,)), ((0, 3), (0, 0)), ((5, 5), (5, 5))], ids=str)
def test_loss_is_that_of_plain_loops(smoothing: float, lengths: Any) -> None:
    model = _build(projection=3)
    input_ids, labels = _captions(lengths)
    losses = _losses(model, input_ids, labels, smoothing, features=_features())
    expected = _plain_loss(model, _features(), input_ids, labels, smoothing)
    assert expected[0] > 1
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("projection", [None, 3])
@pytest.mark.parametrize("lengths", [LENGTHS, ((0, 3), (0, 0)), ((5, 5), (5, 5))], ids=str)
def test_word_presence_is_that_of_plain_loops(projection: int | None, lengths: Any) -> None:
    model = _build(projection=projection)
    input_ids, labels = _captions(lengths)
    assert read(model, input_ids, labels, features=_features()).word_presence is None
    model.add_word_head(0.0)
    model.double()
    head, features = model.word_head, model.projection(_features())
    expected, captions = 0.0, len(labels) // len(features)
    for image in range(len(features)):
        said = {word for row in labels[image * captions :][:captions].tolist() for word in row if word != IGNORED_LABEL}
        mean = [sum(cell[c] for cell in features[image].tolist()) / features.shape[1] for c in range(features.shape[2])]
        for word in range(head.out_features if said else 0):
            logit = sum(w * m for w, m in zip(head.weight[word].tolist(), mean, strict=True)) + head.bias[word].item()
            chance = 1 / (1 + math.exp(-logit))
            expected -= math.log(chance if word in said else 1 - chance)
    assert expected > 0.1
    assert _losses(model, input_ids, labels, features=_features())[2].item() == pytest.approx(expected, rel=1e-6)


def test_a_word_head_begins_with_one_word_in_a_hundred_and_can_be_left_out() -> None:
    model = _build()
    without = set(model.state_dict())
    model.add_word_head(0.0)
    torch.testing.assert_close(model.word_head.bias.sigmoid(), torch.full_like(model.word_head.bias, 0.01))
    with model.without_word_head():
        assert set(model.state_dict()) == without
    assert set(model.state_dict()) == without | {"word_head.weight", "word_head.bias"}


def test_photos_give_the_loss_of_their_features() -> None:
    model = _build()
    photos = torch.randn(2, 3, 8, 8).double()
    features = model.encode(photos)
    assert features.shape == (2, CELLS, CHANNELS)
    input_ids, labels = _captions()
    from_photos = _losses(model, input_ids, labels, pixel_values=photos)
    assert torch.equal(from_photos, _losses(model, input_ids, labels, features=features))


def test_longer_padding_changes_nothing() -> None:
    """Nor do the ids that stand in the padding."""
    model = _build()
    losses = [_losses(model, *_captions(extra_padding=extra), features=_features()).tolist() for extra in (0, 1, 9)]
    assert losses[0] == losses[1] == losses[2]
    input_ids, labels = _captions(extra_padding=2)
    junk = torch.where(labels == IGNORED_LABEL, 7, input_ids)
    assert _losses(model, junk, labels, features=_features()).tolist() == losses[0]


def test_order_of_images_and_captions_changes_nothing() -> None:
    model = _build()
    input_ids, labels = _captions()
    order = torch.tensor([4, 5, 3, 1, 0, 2])  # the second image's captions, shuffled, before the first one's
    straight = _losses(model, input_ids, labels, features=_features())
    moved = _losses(model, input_ids[order], labels[order], features=_features().flip(0))
    torch.testing.assert_close(moved, straight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_word_vector_of_padding_gets_no_gradient(tied: bool) -> None:
    model = _build(tied=tied)
    assert not model.decoder.embedding.weight[PAD].any()
    input_ids, labels = _captions(extra_padding=2)
    loss_of(model, input_ids, labels, features=_features()).backward()
    gradient = model.decoder.embedding.weight.grad
    assert gradient is not None
    assert gradient[BOS].any()
    # Tied, the row is also the head's for `<pad>`, which is a word like any other there.
    assert bool(gradient[PAD].any()) == tied


def test_tied_weights_are_one_tensor() -> None:
    model = _build(tied=True)
    assert model.decoder.head.weight is model.decoder.embedding.weight
    assert _build().decoder.head.weight.shape != _build().decoder.embedding.weight.shape


def test_frozen_encoder_gets_no_gradient_and_the_rest_does() -> None:
    model = _build(projection=3)
    _losses(model, *_captions(), pixel_values=torch.randn(2, 3, 8, 8).double()).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())
    assert model.projection.weight.grad.any()


@pytest.mark.parametrize("width", [1, 4])
def test_batch_without_words_costs_nothing_and_still_reaches_every_parameter(width: int) -> None:
    """A process left without captions takes the step all the same; without gradients the others would wait."""
    model = _build(projection=3)
    model.add_word_head(0.0)
    model.double()
    input_ids = torch.full((6, width), PAD)
    losses = _losses(model, input_ids, torch.full_like(input_ids, IGNORED_LABEL), 0.1, features=_features())
    assert losses.tolist() == [0, 0, 0]
    losses.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_bfloat16_autocast_is_close() -> None:
    model = _build(dtype=torch.float32)
    input_ids, labels = _captions()
    exact = _losses(model, input_ids, labels, 0.1, features=_features(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = read(model, input_ids, labels, features=_features(torch.float32))
        rough = _losses(model, input_ids, labels, 0.1, features=_features(torch.float32))
    assert output.logits.dtype == rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)
    rough[0].backward()
    assert all(p.grad.isfinite().all() for p in model.decoder.parameters())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_temperature_divides_the_logits_of_the_same_states(variant: dict[str, Any]) -> None:
    model = _build(**variant)
    input_ids, _ = _captions(((5, 5, 5), (5, 5, 5)))
    logits, _ = _fast_forward(model, _features(), input_ids, [5] * 6)
    model.decoder.sharpen(0.3)
    sharpened, _ = _fast_forward(model, _features(), input_ids, [5] * 6)
    for word, expected in logits.items():
        torch.testing.assert_close(sharpened[word], expected / 0.3)
