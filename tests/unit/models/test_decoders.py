"""What every decoder of the table must do: training and search agree, rows and images do not mix, and so on.

Shapes: B images, R captions an image, T words, N cells.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from capdist.decoding import SearchOptions, search
from capdist.models import DECODERS
from capdist.models.caption_model import CaptionModel
from capdist.models.decoder import Reading
from capdist.models.ensemble import Ensemble
from capdist.recipe.decoders import DECODER_SECTIONS
from capdist.text.vocabulary import IGNORED_LABEL
from capdist.training.objectives import doubly_stochastic
from tests.models import loss_of, read, tiny_model

PAD, BOS, EOS = 0, 1, 2
WORDS, IMAGES, ROWS, CELLS = 13, 2, 3, 4

pytestmark = pytest.mark.parametrize("name", list(DECODERS))


def _model(name: str, **keys: Any) -> CaptionModel:
    model = tiny_model(name, vocab_size=WORDS, seed=1, **keys).double().eval()
    with torch.no_grad():  # large enough for words to matter
        for parameter in model.decoder.parameters():
            parameter.mul_(2)
    return model


def _features(images: int = IMAGES) -> Tensor:
    return torch.randn(images, CELLS, 6, generator=torch.Generator().manual_seed(2)).double()


def _captions(lengths: list[int], width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return input_ids and labels (rows, T) of random captions."""
    generator = torch.Generator().manual_seed(4)
    words = torch.randint(3, WORDS, (len(lengths), max(lengths) + 1), generator=generator)
    words[:, 0] = BOS
    words = torch.nn.functional.pad(words, (0, (width or max(lengths)) - max(lengths)))
    present = torch.arange(words.shape[1] - 1) < torch.tensor(lengths)[:, None]
    return words[:, :-1].where(present, PAD), words[:, 1:].where(present, IGNORED_LABEL)


def _by_place(reading: Reading, width: int) -> dict[tuple[int, int], Tensor]:
    places = [divmod(word, width) for word in reading.words.tolist()]
    return dict(zip(places, reading.logits, strict=True))


def _stepwise(model: CaptionModel, features: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (B·R, T, V) and attention (B·R, T, N) of reading word by word."""
    images = len(features)
    words = input_ids.view(images, -1, input_ids.shape[1])
    state = model.reorder(model.init_state(features), torch.zeros(words.shape[:2], dtype=torch.long))
    steps = []
    for position in range(words.shape[2]):
        logits, attention, state = model.step(words[:, :, position], state)
        steps.append((logits.flatten(0, 1), attention.flatten(0, 1)))
    logits, attention = zip(*steps, strict=True)
    return torch.stack(logits, dim=1), torch.stack(attention, dim=1)


def test_whole_captions_are_read_as_word_by_word(name: str) -> None:
    model, lengths = _model(name), [4, 1, 6, 3, 0, 6]
    input_ids, _ = _captions(lengths)
    reading = model.decoder.read(_features(), input_ids, lengths)
    logits, attention = _stepwise(model, _features(), input_ids)
    found = _by_place(reading, input_ids.shape[1])
    assert found.keys() == {(row, position) for row, length in enumerate(lengths) for position in range(length)}
    for place, values in found.items():
        torch.testing.assert_close(values, logits[place], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones_like(attention[..., 0]))
    if reading.attention is not None:
        sums = torch.stack([attention[row, :length].sum(dim=0) for row, length in enumerate(lengths)])
        torch.testing.assert_close(reading.attention, sums, rtol=1e-9, atol=1e-9)


def test_a_word_does_not_see_the_words_after_it(name: str) -> None:
    model, (input_ids, _) = _model(name), _captions([6] * 6)
    before = _by_place(model.decoder.read(_features(), input_ids, [6] * 6), 6)
    changed = input_ids.clone()
    changed[:, 4] = (input_ids[:, 4] + 1) % WORDS
    after = _by_place(model.decoder.read(_features(), changed, [6] * 6), 6)
    for (row, position), values in before.items():
        same = torch.allclose(values, after[row, position], rtol=1e-12, atol=1e-12)
        assert same == (position < 4)


def test_padding_changes_nothing(name: str) -> None:
    model = _model(name)
    lengths = [4, 1, 6, 3, 0, 6]
    narrow, wide = (_captions(lengths, width) for width in (6, 9))
    assert torch.equal(narrow[1], wide[1][:, :6])
    losses = [loss_of(model, *captions, features=_features()) for captions in (narrow, wide)]
    junk = wide[0].where(wide[1] != IGNORED_LABEL, 7), wide[1]
    losses.append(loss_of(model, *junk, features=_features()))
    for loss in losses[1:]:
        assert loss.item() == pytest.approx(losses[0].item(), rel=1e-9)


def test_images_and_captions_do_not_mix(name: str) -> None:
    model, lengths = _model(name), [4, 1, 6, 3, 2, 6]
    input_ids, labels = _captions(lengths)
    order = torch.tensor([4, 5, 3, 1, 0, 2])  # the second image's captions, shuffled, before the first one's
    straight = loss_of(model, input_ids, labels, features=_features())
    moved = loss_of(model, input_ids[order], labels[order], features=_features().flip(0))
    assert moved.item() == pytest.approx(straight.item(), rel=1e-9)
    alone = [
        loss_of(model, input_ids[row : row + 1], labels[row : row + 1], features=_features()[row // 3][None]).item()
        for row in range(6)
    ]
    assert sum(alone) == pytest.approx(straight.item(), rel=1e-9)


def test_reordered_rows_go_on_from_their_parents(name: str) -> None:
    model, (input_ids, _) = _model(name), _captions([5] * 6)
    words, parents = input_ids.view(IMAGES, ROWS, 5), torch.tensor([[2, 2, 0, 1], [0, 1, 1, 2]])
    state = model.reorder(model.init_state(_features()), torch.zeros(IMAGES, ROWS, dtype=torch.long))
    for position in range(4):
        _, _, state = model.step(words[:, :, position], state)
    state = model.reorder(state, parents)
    nexts = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    logits, _, _ = model.step(nexts, state)
    for image in range(IMAGES):
        for row in range(4):
            caption = torch.cat([words[image, parents[image, row], :4], nexts[image, row : row + 1]])[None]
            expected = model.decoder.read(_features()[image][None], caption, [5])
            torch.testing.assert_close(logits[image, row], _by_place(expected, 5)[0, 4], rtol=1e-9, atol=1e-9)


def test_selected_images_go_on_alone(name: str) -> None:
    model = _model(name)
    state = model.init_state(_features(5))
    _, _, state = model.step(torch.full((5, 1), BOS), state)
    kept = torch.tensor([3, 0])
    tokens = torch.tensor([[3], [4], [5], [6], [7]])
    of_all, attention, _ = model.step(tokens, state)
    of_kept, attention_of_kept, _ = model.step(tokens[kept], model.select(state, kept))
    torch.testing.assert_close(of_kept, of_all[kept])
    torch.testing.assert_close(attention_of_kept, attention[kept])


def test_a_batch_without_words_still_reaches_every_parameter(name: str) -> None:
    """A process without captions takes the step all the same; without gradients the others would wait."""
    model = _model(name).train()
    input_ids = torch.full((6, 4), PAD)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    output = read(model, input_ids, labels, features=_features())
    assert output.logits.shape == (0, WORDS)
    loss = loss_of(model, input_ids, labels, features=_features())
    if output.attention is not None:
        loss = loss + doubly_stochastic(output, labels)
    assert loss.item() == 0
    loss.backward()
    for parameter_name, parameter in model.decoder.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert not parameter.grad.any(), parameter_name


@pytest.mark.parametrize("tied", [False, True])
def test_a_temperature_divides_the_logits(name: str, tied: bool) -> None:
    if tied and "tie_weights" not in DECODER_SECTIONS[name].model_fields:
        pytest.skip(f"{name} has no tie_weights")
    model = _model(name, **({"tie_weights": True} if tied else {}))
    input_ids, _ = _captions([5] * 6)
    before = model.decoder.read(_features(), input_ids, [5] * 6).logits
    model.decoder.sharpen(0.3)
    after = model.decoder.read(_features(), input_ids, [5] * 6).logits
    torch.testing.assert_close(after, before / 0.3)


def test_dropout_is_for_training_only(name: str) -> None:
    model, captions = _model(name, dropout=0.5), _captions([5] * 6)
    losses = [loss_of(model, *captions, features=_features()).item() for _ in range(2)]
    assert losses[0] == losses[1]
    model.train()
    losses = [loss_of(model, *captions, features=_features()).item() for _ in range(2)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("beam_size", [1, 3])
def test_captions_found_have_the_probability_of_their_words(name: str, beam_size: int) -> None:
    model, features = _model(name), _features(8)
    options = SearchOptions(
        bos_id=BOS, eos_id=EOS, pad_id=PAD, suppressed_ids=(PAD, BOS), beam_size=beam_size, max_length=7, min_length=1
    )
    found = search(model, features, options)
    for image in range(len(features)):
        for rank in range(beam_size):
            words = found.tokens[image, rank, : int(found.lengths[image, rank])].tolist()
            said = [*words, EOS] if found.ended[image, rank] else words
            caption = torch.tensor([[BOS, *said[:-1]]])
            logits = _by_place(model.decoder.read(features[image][None], caption, [len(said)]), len(said))
            log_p = sum(logits[0, t].log_softmax(dim=0)[word].item() for t, word in enumerate(said))
            assert found.log_probabilities[image, rank].item() == pytest.approx(log_p, abs=1e-4)


def test_an_ensemble_averages_probabilities(name: str) -> None:
    """Also with a decoder of another kind."""
    members = [_model(name), _model(next(iter(DECODERS)))]
    members[1].encoder.load_state_dict(members[0].encoder.state_dict())
    ensemble = Ensemble(members, ["one", "other"]).eval()
    features = _features()
    state = ensemble.init_state(features)
    log_p, attention, state = ensemble.step(torch.full((IMAGES, 1), BOS), state)
    alone = [member.step(torch.full((IMAGES, 1), BOS), member.init_state(features)) for member in members]
    mean = sum(logits.softmax(dim=-1) for logits, _, _ in alone) / 2
    torch.testing.assert_close(log_p.double().exp(), mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(attention, (alone[0][1] + alone[1][1]) / 2)
    state = ensemble.select(ensemble.reorder(state, torch.zeros(IMAGES, 2, dtype=torch.long)), torch.tensor([1]))
    assert ensemble.step(torch.tensor([[3, 4]]), state)[0].shape == (1, 2, WORDS)
