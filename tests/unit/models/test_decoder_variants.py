"""Each decoder against the same network written plainly, word by word; its steps, its search and its dropout.

Shapes: B images, R captions an image, T words, N cells, C channels, H state width.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from capdist.config import DecoderSection, EncoderSection, Recipe
from capdist.decoding import SearchOptions, search
from capdist.errors import UsageError
from capdist.models import caption_model, decoder
from capdist.models.caption_model import CaptionModel, build_model
from capdist.models.decoder import Decoder, SoftAttentionDecoder
from capdist.models.deferred import StepLinear
from capdist.models.encoder import Backbone, Encoder
from capdist.models.multi_head import MultiHeadAttention
from capdist.models.packing import Packing
from capdist.models.up_down import UpDownDecoder
from capdist.text.vocabulary import IGNORED_LABEL
from tests.unit.models.plain_decoders import Caption, soft_attention_caption, up_down_caption

PAD, BOS, EOS = 0, 1, 2
VOCABULARY, CHANNELS, CELLS, HIDDEN = 13, 6, 4, 8
LENGTHS = (4, 1, 6, 3, 0, 6)  # words of each caption, three an image; one row holds none
IMAGES, CAPTIONS = 2, 3

MULTI_HEAD = [("multi_head", {"num_heads": heads, "gate": gate}) for heads, gate in ((1, True), (3, True), (3, False))]
VARIANTS = [*MULTI_HEAD, ("multi_head", {"num_heads": 2, "tie_weights": True}), ("up_down", {})]
VARIANTS += [("up_down", {"tie_weights": True})]
ALL = [("soft_attention", {}), ("multi_head", {}), ("up_down", {})]


def _decoder(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Decoder:
    torch.manual_seed(1)
    common: dict[str, Any] = {
        "feature_size": CHANNELS, "vocab_size": VOCABULARY, "embed_size": 8 if options.get("tie_weights") else 5,
        "hidden_size": HIDDEN, "attention_size": 12, "dropout": 0.0, "tie_weights": False, "pad_id": PAD,
    }  # fmt: skip
    own = {"soft_attention": {"gate": True}, "multi_head": {"gate": True, "num_heads": 3}, "up_down": {}}[name]
    made = (UpDownDecoder if name == "up_down" else SoftAttentionDecoder)(**{**common, **own, **options}).to(dtype)
    with torch.no_grad():  # large enough for attention and gates to differ from word to word
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


def _model(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> CaptionModel:
    return CaptionModel(Encoder(_backbone()), _decoder(name, dtype, **options), None)


def _backbone() -> Backbone:
    network = nn.Sequential(OrderedDict(layer1=nn.Conv2d(3, CHANNELS, 4, stride=4)))
    return Backbone(network, CHANNELS, (0.5,) * 3, (0.5,) * 3)


def _features(images: int = IMAGES) -> Tensor:
    return torch.randn(images, CELLS, CHANNELS, generator=torch.Generator().manual_seed(2)).double()


def _input_ids() -> Tensor:
    ids = torch.randint(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = BOS
    return ids


def _plain(model: Decoder, features: Tensor, row: int, masks: Any = (), steps: int | None = None) -> Caption:
    read = up_down_caption if isinstance(model, UpDownDecoder) else soft_attention_caption
    words = _input_ids()[row, : LENGTHS[row] if steps is None else steps]
    return read(model, features[row // CAPTIONS], words, masks)


def _forward(model: Decoder, features: Tensor) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """Return logits by (row, position), and the attention of each row summed over its words."""
    hidden, looked = model(features, _input_ids(), Packing.of(torch.tensor(LENGTHS), max(LENGTHS), features.device))
    rows = sorted(range(len(LENGTHS)), key=lambda row: -LENGTHS[row])
    order = [(row, position) for position in range(max(LENGTHS)) for row in rows if position < LENGTHS[row]]
    return dict(zip(order, model.head(hidden), strict=True)), looked


def _assert_equal(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_captions_and_gradients_are_those_of_the_plain_network(name: str, options: dict[str, Any]) -> None:
    fast = _decoder(name, **options)
    plain = copy.deepcopy(fast)
    features, plain_features = _features().requires_grad_(), _features().requires_grad_()
    logits, looked = _forward(fast, features)
    generator = torch.Generator().manual_seed(8)
    loss = plain_loss = torch.zeros(()).double()
    for row, length in enumerate(LENGTHS):
        if not length:
            assert not looked[row].any()
            continue
        expected, weights = _plain(plain, plain_features, row)
        found = torch.stack([logits[row, position] for position in range(length)])
        _assert_equal(found, expected)
        _assert_equal(looked[row], weights.sum(dim=0))
        mix, gaze = (torch.randn(like.shape, generator=generator).double() for like in (expected, looked[row]))
        loss = loss + (mix * found).sum() + (gaze * looked[row]).sum()
        plain_loss = plain_loss + (mix * expected).sum() + (gaze * weights.sum(dim=0)).sum()

    loss.backward()
    plain_loss.backward()
    _assert_equal(features.grad, plain_features.grad, 1e-9)
    gradients = {parameter: values.grad for parameter, values in plain.named_parameters()}
    assert len(gradients) >= 12
    for parameter, values in fast.named_parameters():
        expected_gradient = gradients[parameter]
        assert expected_gradient is not None
        assert expected_gradient.abs().max() > 1e-3, parameter
        _assert_equal(values.grad, expected_gradient, 1e-9)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_steps_add_up_to_whole_captions_of_any_length(name: str, options: dict[str, Any]) -> None:
    model = _decoder(name, **options).eval()
    logits, looked = _forward(model, _features())
    state = model.init_state(_features())
    state = model.reorder(state, torch.zeros(IMAGES, CAPTIONS, dtype=torch.long))
    total = torch.zeros(len(LENGTHS), CELLS).double()
    compared = 0
    for position in range(max(LENGTHS)):
        words = _input_ids()[:, position].view(IMAGES, CAPTIONS)
        step_logits, weights, state = model.step(words, state)
        _assert_equal(weights.sum(dim=-1), torch.ones(IMAGES, CAPTIONS).double())
        for row, length in enumerate(LENGTHS):
            if position < length:
                _assert_equal(step_logits.flatten(0, 1)[row], logits[row, position])
                total[row] += weights.flatten(0, 1)[row]
                compared += 1
    assert compared == sum(LENGTHS)
    _assert_equal(total, looked)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_search_state_never_repeats_what_belongs_to_the_image(name: str, options: dict[str, Any]) -> None:
    model = _decoder(name, **options).eval()
    state = model.init_state(_features())
    memory = [tuple(values.shape) for values in state.memory]
    for rows in (1, 4, 2):
        state = model.reorder(state, torch.zeros(IMAGES, rows, dtype=torch.long))
        before = state
        logits, weights, state = model.step(torch.full((IMAGES, rows), BOS), state)
        assert logits.shape == (IMAGES, rows, VOCABULARY)
        assert weights.shape == (IMAGES, rows, CELLS)
        assert {tuple(values.shape) for values in state.recurrent} == {(IMAGES, rows, HIDDEN)}
        assert state.memory is before.memory
        assert state.image_gates is before.image_gates
    assert [tuple(values.shape) for values in state.memory] == memory


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_search_finds_what_it_finds_one_image_at_a_time(
    name: str, options: dict[str, Any], beam_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the log-probabilities are those that the plain network gives to the captions found."""
    model = _model(name, **options).eval()
    with torch.no_grad():  # as sure of itself as a trained network, with captions of different lengths
        model.decoder.head.weight *= 3
        model.decoder.head.bias[EOS] += 2
    select, kept = model.decoder.select, []
    monkeypatch.setattr(model.decoder, "select", lambda state, images: kept.append(images) or select(state, images))
    features = _features(images=12)
    rules = SearchOptions(
        bos_id=BOS, eos_id=EOS, pad_id=PAD, suppressed_ids=(PAD, BOS), beam_size=beam_size, max_length=9, min_length=1
    )
    found = search(model, features, rules, return_attention=True)
    assert kept or beam_size == 1, "no image was decided before the others"
    read = up_down_caption if name == "up_down" else soft_attention_caption
    for image in range(len(features)):
        alone = search(model, features[image : image + 1], rules, return_attention=True)
        assert torch.equal(found.tokens[image], alone.tokens[0])
        _assert_equal(found.attention[image], alone.attention[0], 1e-6)
        for rank in range(beam_size):
            words = found.tokens[image, rank, : int(found.lengths[image, rank])]
            said = torch.cat([words, torch.tensor([EOS])]) if found.ended[image, rank] else words
            logits, looked = read(model.decoder, features[image], torch.cat([torch.tensor([BOS]), said[:-1]]))
            log_p = logits.log_softmax(dim=1)[range(len(said)), said].sum().item()
            assert found.log_probabilities[image, rank].item() == pytest.approx(log_p, abs=1e-4)
            _assert_equal(found.attention[image, rank, : len(words)].double(), looked[: len(words)], 1e-5)
    assert len(set(found.lengths.flatten().tolist())) > 1


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_batch_without_words_still_reaches_every_parameter(name: str, options: dict[str, Any]) -> None:
    model = _model(name, **options)
    input_ids = torch.full((6, 4), PAD)
    loss = model(input_ids, torch.full_like(input_ids, IGNORED_LABEL), features=_features())
    (loss.cross_entropy + loss.doubly_stochastic).backward()
    for parameter, values in model.decoder.named_parameters():
        assert values.grad is not None, parameter
        assert not values.grad.any(), parameter


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_bfloat16_autocast_is_close(name: str, options: dict[str, Any]) -> None:
    model = _model(name, torch.float32, **options)
    labels = torch.where(torch.arange(6) < torch.tensor(LENGTHS)[:, None], _input_ids().roll(1, 1), IGNORED_LABEL)
    exact = model(_input_ids(), labels, features=_features().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(_input_ids(), labels, features=_features().float())
    torch.testing.assert_close(torch.stack(rough), torch.stack(exact), rtol=0.05, atol=0)
    rough.cross_entropy.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_dropout_keys_do_nothing_in_evaluation_or_at_zero(name: str, options: dict[str, Any]) -> None:
    plain = _decoder(name, **options).train()
    before = torch.get_rng_state()
    expected = _forward(plain, _features())
    assert torch.equal(torch.get_rng_state(), before), "a dropout of zero drew random numbers"
    dropping = _decoder(name, feature_dropout=0.5, state_dropout=0.5, **options)
    assert list(dropping.state_dict()) == list(plain.state_dict())
    for is_training in (True, False):
        found, looked = _forward(dropping.train(is_training), _features())
        assert torch.equal(looked, expected[1]) != is_training
        assert all(torch.equal(found[place], values) for place, values in expected[0].items()) != is_training
    step, _, _ = dropping.step(torch.full((IMAGES, 1), BOS), dropping.init_state(_features()))
    assert torch.equal(step, plain.eval().step(torch.full((IMAGES, 1), BOS), plain.init_state(_features()))[0])


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_features_are_dropped_once_for_all_that_is_made_of_them(name: str, options: dict[str, Any]) -> None:
    """Trained with dropout is the network that reads the features that were left."""
    model = _decoder(name, feature_dropout=0.4, **options).train()
    left: list[Tensor] = []
    model.feature_dropout.register_forward_hook(lambda module, inputs, output: left.append(output))
    torch.manual_seed(3)
    logits, _ = _forward(model, _features())
    torch.manual_seed(3)
    state = model.init_state(_features())
    assert len(left) == 2
    assert torch.equal(*left)
    is_dropped = left[0] == 0
    assert 0 < is_dropped.double().mean() < 1
    _assert_equal(left[0], (_features() / 0.6).masked_fill(is_dropped, 0))
    first, _, _ = model.step(torch.full((IMAGES, 1), BOS), state)
    for row, length in enumerate(LENGTHS):
        if length:
            expected, _ = _plain(model, left[0], row)
            _assert_equal(torch.stack([logits[row, position] for position in range(length)]), expected)
            _assert_equal(first[row // CAPTIONS, 0], expected[0])


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_state_dropout_has_one_mask_for_all_steps_of_a_caption(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are told from the zeros that go into the recurrent product; the head reads an undropped state."""
    seen: list[tuple[StepLinear, Tensor]] = []

    class Recording(StepLinear):
        def __call__(self, inputs: Tensor) -> Tensor:
            seen.append((self, inputs.detach()))
            return super().__call__(inputs)

    monkeypatch.setattr(decoder, "StepLinear", Recording)
    monkeypatch.setattr("capdist.models.up_down.StepLinear", Recording)
    model = _decoder(name, state_dropout=0.4, **options).train()
    torch.manual_seed(5)
    logits, _ = _forward(model, _features())
    inputs = [values for product, values in seen if product is seen[0][0]]
    assert len(inputs) == max(LENGTHS)
    is_kept = torch.zeros_like(inputs[0], dtype=torch.bool)
    for values in inputs:
        is_kept[: len(values)] |= values != 0
    masks = is_kept.double() / 0.6
    order = sorted(range(len(LENGTHS)), key=lambda row: -LENGTHS[row])
    assert not torch.equal(masks[0], masks[1]), "two captions have one mask"
    for place, row in enumerate(order):
        if LENGTHS[row] > 1:
            assert 0 < is_kept[place].double().mean() < 1
            expected, _ = _plain(model, _features(), row, masks[place].split(HIDDEN))
            found = torch.stack([logits[row, position] for position in range(LENGTHS[row])])
            _assert_equal(found, expected)


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_masks_of_a_search_go_with_their_rows(name: str, options: dict[str, Any]) -> None:
    model = _decoder(name, state_dropout=0.4, **options).train()
    torch.manual_seed(5)
    state = model.init_state(_features())
    masks = [mask[1, 0] for mask in state.masks]
    assert not any(torch.equal(mask[0], mask[1]) for mask in state.masks)
    row = CAPTIONS  # the first caption of the second image
    expected, _ = _plain(model, _features(), row, masks, steps=4)
    state = model.reorder(model.select(state, torch.tensor([1])), torch.zeros(1, 2, dtype=torch.long))
    for position in range(4):
        found, _, state = model.step(_input_ids()[row, position].expand(1, 2), state)
        _assert_equal(found[0, 1], expected[position])


def _built(monkeypatch: pytest.MonkeyPatch, projection: int | None = None, **keys: Any) -> Any:
    monkeypatch.setattr(caption_model, "build_backbone", lambda *_: _backbone())
    sizes = {"embed_size": 5, "hidden_size": HIDDEN, "attention_size": 12}
    encoder = EncoderSection(name="resnet18", projection=projection)
    return build_model(encoder, DecoderSection(**{**sizes, **keys}), vocab_size=VOCABULARY, pad_id=PAD).decoder


def test_the_recipe_decides_which_decoder_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    soft = _built(monkeypatch, gate=False, num_heads=5)
    assert isinstance(soft, SoftAttentionDecoder)
    assert not isinstance(soft.attention, MultiHeadAttention)
    assert soft.gate is None
    heads = _built(monkeypatch, name="multi_head", num_heads=2, feature_dropout=0.1, state_dropout=0.2)
    assert isinstance(heads.attention, MultiHeadAttention)
    assert heads.gate is not None
    assert (heads.attention.num_heads, heads.feature_dropout.p, heads.state_dropout) == (2, 0.1, 0.2)
    two = _built(monkeypatch, name="up_down", projection=4, feature_dropout=0.3, dropout=0.4)
    assert isinstance(two, UpDownDecoder)
    assert two.language_lstm.input_size == 4 + HIDDEN
    assert (two.dropout.p, two.feature_dropout.p, two.state_dropout) == (0.4, 0.3, 0.0)


def test_heads_that_do_not_divide_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^decoder\.num_heads: .*\b4\b.*\b6\b.* channels") as caught:
        _built(monkeypatch, name="multi_head", num_heads=4)
    assert len(caught.value.mistakes) == 1
    _built(monkeypatch, name="multi_head", num_heads=4, projection=8)
    with pytest.raises(UsageError) as caught:
        Recipe(
            decoder=DecoderSection(name="multi_head", num_heads=3, attention_size=100),
            encoder=EncoderSection(projection=200),
        )
    expected = "decoder.num_heads: {} is no multiple of 3; change either"
    wrong = ("decoder.attention_size = 100", "encoder.projection = 200")
    assert caught.value.mistakes == tuple(map(expected.format, wrong))
    Recipe(decoder=DecoderSection(name="up_down", num_heads=3, attention_size=100))
