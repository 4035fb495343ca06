"""Ensembles against a plain loop that averages the probabilities of plain networks, word by word, in float64.

Shapes: B images, N cells, C channels, T words, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from capdist.data.images import Preprocessing
from capdist.decoding import SearchOptions, SearchResult, search
from capdist.errors import CheckpointError, UsageError
from capdist.inference.captioner import Captioner
from capdist.model_folder import TrainedModel
from capdist.models.caption_model import CaptionModel
from capdist.models.encoder import Backbone, Encoder
from capdist.models.ensemble import Ensemble
from capdist.recipe.decoders import SoftAttentionSection
from capdist.recipe.search import SearchSettings
from capdist.recipe.sections import EncoderSection
from capdist.text.vocabulary import Vocabulary
from tests.models import tiny_decoder
from tests.unit.models.plain_decoder import plain_caption

WORDS = ["a", "red", "dog"]
PAD, BOS, EOS, UNK, *SAYABLE = range(4 + len(WORDS))
IMAGES, SIDE = 10, 8


def _member(seed: int, channels: int = 6, projection: int | None = None, **options: Any) -> CaptionModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"embed_size": 5, "hidden_size": 6 + seed, "attention_size": 12, "gate": False}
    decoder = tiny_decoder(
        feature_size=projection or channels, vocab_size=4 + len(WORDS), dropout=0.5, **{**sizes, **options}
    )
    member = CaptionModel(_encoder(channels), decoder, projection).double().eval()
    with torch.no_grad():  # sure of itself, and of something else after each word and for each photo
        for parameter in member.parameters():
            parameter.mul_(3)
        member.decoder.embedding.weight.mul_(10)
        member.decoder.head.bias.zero_()
    return member


def _encoder(channels: int, stride: int = 4, last: nn.Module | None = None) -> Encoder:
    layers = OrderedDict(layer1=nn.Conv2d(3, channels, stride, stride=stride), last=last or nn.Tanh())
    return Encoder(Backbone(nn.Sequential(layers), channels, (0.5,) * 3, (0.5,) * 3))


def _ensemble(*members: CaptionModel) -> Ensemble:
    return Ensemble(members, [f"runs/{number}/model" for number in range(1, len(members) + 1)]).eval()


def _different() -> list[CaptionModel]:
    """Members that have only vocabulary and number of cells in common."""
    return [
        _member(1),
        _member(2, channels=4, gate=True),
        _member(3, channels=5, projection=9, embed_size=9, tie_weights=True),
    ]


def _photos(count: int = IMAGES) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def _options(**changes: Any) -> SearchOptions:
    ids = {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD, "suppressed_ids": (PAD, BOS, UNK)}
    return SearchOptions(**{**ids, "beam_size": 1, "length_penalty": 1.0, **changes})


@torch.no_grad()
def _plain_probabilities(members: list[CaptionModel], photo: Tensor, words: list[int]) -> tuple[Tensor, Tensor]:
    """Return the mean probabilities (T + 1, V) after each beginning of a caption, and the mean attention (T + 1, N)."""
    of_members = []
    for member in members:
        features = member.projection(member.encoder.network(photo[None])[0].flatten(1).T)
        of_members.append(plain_caption(member.decoder, features, torch.tensor([BOS, *words])))
    probabilities = [logits.exp() / logits.exp().sum(dim=1, keepdim=True) for logits, _ in of_members]
    return sum(probabilities) / len(members), sum(looked for _, looked in of_members) / len(members)


def _plain_log_probability(members: list[CaptionModel], photo: Tensor, words: list[int], ended: bool) -> float:
    probabilities, _ = _plain_probabilities(members, photo, words)
    said = [*words, EOS] if ended else words
    return sum(math.log(probabilities[position, word]) for position, word in enumerate(said))


def _plain_greedy(members: list[CaptionModel], photo: Tensor, max_length: int) -> tuple[list[int], bool]:
    words: list[int] = []
    while True:
        last = _plain_probabilities(members, photo, words)[0][-1].tolist()
        word = max([EOS, *SAYABLE], key=last.__getitem__)
        if word == EOS or len(words) == max_length:
            return words, word == EOS
        words.append(word)


def _said(result: SearchResult, image: int, rank: int = 0) -> list[int]:
    return result.tokens[image, rank, : result.lengths[image, rank]].tolist()


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_one_model_any_number_of_times_is_the_model_itself(beam_size: int, count: int) -> None:
    model, options = _member(1), _options(beam_size=beam_size, max_length=7)
    ensemble = _ensemble(*[model] * count)
    alone = search(model, model.encode(_photos()), options, return_attention=True)
    together = search(ensemble, ensemble.encode(_photos()), options, return_attention=True)
    assert torch.equal(together.tokens, alone.tokens)
    assert len({*map(tuple, alone.tokens[:, 0].tolist())}) > 2
    torch.testing.assert_close(together.log_probabilities, alone.log_probabilities, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together.attention, alone.attention, rtol=0, atol=1e-6)


def test_greedy_search_takes_the_word_of_the_highest_mean_probability() -> None:
    members = _different()
    ensemble = _ensemble(*members)
    found = search(ensemble, ensemble.encode(_photos()), _options(max_length=6))
    alone = [search(member, member.encode(_photos()), _options(max_length=6)).tokens for member in members]
    for image, photo in enumerate(_photos()):
        words, ended = _plain_greedy(members, photo, 6)
        assert (_said(found, image), bool(found.ended[image, 0])) == (words, ended)
        expected = _plain_log_probability(members, photo, words, ended)
        assert found.log_probabilities[image, 0].item() == pytest.approx(expected, abs=1e-5)
    assert not any(torch.equal(found.tokens, tokens) for tokens in alone)


def test_a_wide_beam_finds_the_best_of_all_captions() -> None:
    members = _different()[:2]
    ensemble = _ensemble(*members)
    # As wide as all captions are many, which no user may ask for.
    options = _options(max_length=3, length_penalty=0.7).model_copy(update={"beam_size": 200})
    found = search(ensemble, ensemble.encode(_photos(2)), options)
    for image, photo in enumerate(_photos(2)):
        captions = [list(words) for length in range(4) for words in itertools.product(SAYABLE, repeat=length)]
        scores = [_plain_log_probability(members, photo, words, True) / (len(words) + 1) ** 0.7 for words in captions]
        order = sorted(range(len(captions)), key=lambda index: -scores[index])
        assert [_said(found, image, rank) for rank in range(len(order))] == [captions[index] for index in order]
        expected = [scores[index] for index in order]
        assert found.scores[image, : len(order)].tolist() == pytest.approx(expected, abs=1e-5)


def test_images_that_are_decided_leave_and_log_probabilities_and_attention_are_means(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members, options = _different(), _options(beam_size=3, max_length=8, length_penalty=0.0)
    ensemble = _ensemble(*members)
    select, kept = ensemble.select, []
    monkeypatch.setattr(ensemble, "select", lambda state, images: kept.append(images) or select(state, images))
    found = search(ensemble, ensemble.encode(_photos()), options, return_attention=True)
    assert kept, "no image was decided before the others"
    for image, photo in enumerate(_photos()):
        alone = search(ensemble, ensemble.encode(photo[None]), options)
        assert torch.equal(found.tokens[image], alone.tokens[0])
        for rank in range(3):
            words, ended = _said(found, image, rank), bool(found.ended[image, rank])
            expected = _plain_log_probability(members, photo, words, ended)
            assert found.log_probabilities[image, rank].item() == pytest.approx(expected, abs=1e-5)
            looked = _plain_probabilities(members, photo, words)[1][: len(words)]
            torch.testing.assert_close(
                found.attention[image, rank, : len(words)].double(), looked, rtol=1e-5, atol=1e-5
            )


def test_bfloat16_members_give_float32_log_probabilities_that_sum_to_one() -> None:
    ensemble = _ensemble(*(member.bfloat16() for member in _different()))
    state = ensemble.init_state(ensemble.encode(_photos().bfloat16()))
    log_p, _, _ = ensemble.step(torch.full((IMAGES, 1), BOS), state)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.log_softmax(dim=-1), log_p, rtol=0, atol=1e-6)


def _count_passes(members: list[CaptionModel]) -> list[int]:
    """Encode photos by an ensemble and return how often each member's encoder was called."""
    passes = [0] * len(members)
    for index, member in enumerate(members):

        def count(*_: Any, index: int = index) -> None:
            passes[index] += 1

        member.encoder.register_forward_hook(count)
    ensemble = _ensemble(*members)
    features = ensemble.encode(_photos())
    found = search(ensemble, features, _options(max_length=6))
    for image, photo in enumerate(_photos()):
        assert (_said(found, image), bool(found.ended[image, 0])) == _plain_greedy(members, photo, 6)
    assert features.shape[2] == sum(m.encoder.channels for m, times in zip(members, passes, strict=True) if times)
    return passes


def test_encoders_with_equal_weights_encode_once() -> None:
    first, other, third = _member(1), _member(2), _member(3, gate=True)
    third.encoder = copy.deepcopy(first.encoder)
    assert _count_passes([first, other, third]) == [1, 1, 0]


def test_networks_that_differ_in_what_is_no_weight_encode_each() -> None:
    first, other = _member(1), _member(2)
    other.encoder = _encoder(6, last=nn.Sigmoid()).double().eval()
    other.encoder.load_state_dict(first.encoder.state_dict())
    assert _count_passes([first, other]) == [1, 1]


def test_grids_of_different_sizes_are_refused_by_name() -> None:
    first, other = _member(1), _member(2)
    other.encoder = _encoder(6, stride=2).double().eval()
    with pytest.raises(UsageError) as caught:
        _ensemble(first, other).encode(_photos())
    (mistake,) = caught.value.lines
    assert all(part in mistake for part in ("runs/2/model", "16 cells", "runs/1/model", "4;"))


def _trained(seed: int, words: list[str] = WORDS, **preprocessing: Any) -> TrainedModel:
    prepared = Preprocessing(**{"image_size": SIDE, "mean": (0.5,) * 3, "std": (0.25,) * 3, **preprocessing})
    search_settings = SearchSettings(beam_size=seed, length_penalty=0.5, min_length=0)
    return TrainedModel(
        _member(seed).float(), Vocabulary(words), prepared, EncoderSection(), SoftAttentionSection(), 4 + seed,
        search_settings, {}, f"digest {seed}",
    )  # fmt: skip


def test_a_captioner_of_several_searches_as_the_first() -> None:
    captioner = Captioner([_trained(2), _trained(3)], "cpu")
    assert (captioner.options().beam_size, captioner.options().max_length) == (2, 6)
    assert [member.digest for member in captioner.members] == ["digest 2", "digest 3"]
    photo = Image.linear_gradient("L").convert("RGB").rotate(30)
    (caption,) = captioner.caption(photo)
    pixels = captioner.trained.preprocessing.normalize(captioner.trained.preprocessing.resize(photo))
    members = [copy.deepcopy(member.model).double() for member in captioner.members]
    ids = captioner.trained.vocabulary.encode(caption.words)
    expected = _plain_log_probability(members, pixels.double(), ids, ended=len(ids) < 6)
    assert caption.log_probability == pytest.approx(expected, abs=1e-4)


def test_members_that_do_not_belong_together_are_refused_one_line_each() -> None:
    first = _trained(1)
    others = [
        _trained(2, [*WORDS[::-1]]), _trained(2, image_size=16), _trained(2, mean=(0.4,) * 3),
        replace(_trained(2, std=(0.2,) * 3), vocabulary=Vocabulary(["cat"])), _trained(2),
    ]  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        Captioner([first, *others], "cpu", names="abcdef")
    expected = [("b", "vocabulary"), ("c", "image_size 16"), ("d", "mean (0.4"), ("e", "vocabulary"), ("e", "std (0.2")]
    assert len(caught.value.lines) == len(expected)
    for mistake, (name, what) in zip(caught.value.lines, expected, strict=True):
        assert mistake.startswith(f"{name}: ")
        assert what in mistake
        assert " a " in mistake or " a;" in mistake
        assert "\n" not in mistake


def test_a_captioner_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="none given"):
        Captioner.from_pretrained([])
