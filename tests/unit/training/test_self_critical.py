"""Self-critical training: what is sampled, how it is weighted, that its gradient is REINFORCE's, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from capdist.data.batches import CaptionBatch, Collator, Sample
from capdist.data.captions import reference_ids
from capdist.decoding import SearchOptions, greedy_search
from capdist.features.source import StoredFeatures
from capdist.features.store import FeatureStore
from capdist.metrics.rewards import CaptionReward
from capdist.models.caption_model import CaptionModel
from capdist.recipe.sections import Recipe, ScstSection
from capdist.text.vocabulary import IGNORED_LABEL, Vocabulary
from capdist.training.objectives import CrossEntropy
from capdist.training.self_critical import SelfCritical
from capdist.training.step import TrainStep
from tests.conftest import reset_accelerate
from tests.models import tiny_model

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

VOCABULARY = Vocabulary(["a", "dog", "cat", "runs", "sits", "on", "grass"])
CAPTIONS = [
    [["a", "dog", "runs"], ["dog", "runs", "on", "grass"]],
    [["a", "cat", "sits"], ["a", "cat", "sits", "on", "a", "mat"]],
    [["grass"], ["a", "dog", "sits", "on", "grass"]],
]
IMAGES, CELLS, CHANNELS = 3, 4, 6
OPTIONS = SearchOptions(bos_id=1, eos_id=2, pad_id=0, beam_size=1, max_length=6)


class _DoubleStore(FeatureStore):
    def features(self, rows: Tensor) -> Tensor:
        return super().features(rows).double()


def _store() -> FeatureStore:
    return _DoubleStore(np.random.default_rng(0).normal(size=(IMAGES, CELLS, CHANNELS)).astype(np.float16))


def _model(dropout: float = 0.0) -> CaptionModel:
    model = tiny_model(channels=CHANNELS, vocab_size=len(VOCABULARY), hidden_size=16, gate=True, dropout=dropout)
    return model.double()


def _reward(**weights: float) -> CaptionReward:
    return CaptionReward(reference_ids(CAPTIONS, VOCABULARY), **weights)


def _batch(images: tuple[int, ...] = (2, 0, 1), *, filler: bool = False) -> CaptionBatch:
    captions = [[torch.tensor([*VOCABULARY.encode(words), 2]) for words in image] for image in CAPTIONS]
    batch = Collator(2)([Sample(image, image, None, [] if filler else captions[image]) for image in images])
    assert isinstance(batch, CaptionBatch)
    return batch


def _critic(model: CaptionModel, words: dict[int, int] | None = None, **section: Any) -> SelfCritical:
    source = StoredFeatures(_store(), torch.device("cpu"))
    return SelfCritical(
        model, _reward(), ScstSection(**section), OPTIONS, source, Accelerator(cpu=True), mirrored_words=words
    )


def _sampled(seed: int = 0, model: CaptionModel | None = None, **section: Any) -> tuple[CaptionBatch, float, int]:
    batch = _batch()
    critic = _critic((model or _model()).eval(), **section)
    torch.manual_seed(seed)
    return critic.sample(batch, _store().features(batch.feature_rows))


def _captions(batch: CaptionBatch) -> list[list[int]]:
    return [[word for word in row if word != IGNORED_LABEL] for row in batch.labels.tolist()]


def _score(image: int, caption: list[int]) -> float:
    """Score one caption by itself."""
    return float(_reward()(np.array([image]), np.array([caption]))[0])


def test_samples_are_whole_captions_of_the_images() -> None:
    batch, reward_sum, num_samples = _sampled(samples=4)
    captions = _captions(batch)
    assert len(captions) == num_samples == batch.num_captions == 12
    assert batch.num_tokens == sum(map(len, captions))
    assert batch.lengths == tuple(map(len, captions))
    for caption, read in zip(captions, batch.input_ids.tolist(), strict=True):
        assert read[: len(caption)] == [1, *caption[:-1]]
        assert all(0 <= word < len(VOCABULARY) for word in caption)
        assert caption[-1] == 2 or len(caption) == OPTIONS.max_length
        assert 2 not in caption[:-1]
    assert any(caption[-1] == 2 for caption in captions), "some end"
    assert any(caption[-1] != 2 for caption in captions), "some are cut"
    assert reward_sum == pytest.approx(sum(_score((2, 0, 1)[row // 4], c) for row, c in enumerate(captions)))


def test_the_seed_decides() -> None:
    first, again, other = (_captions(_sampled(seed, _model(0.5))[0]) for seed in (3, 3, 4))
    assert first == again != other


def test_samples_of_mirrored_photos_are_scored_as_what_they_mean() -> None:
    """Here dog and cat are each other's mirror image."""
    dog, cat = VOCABULARY.encode(["dog", "cat"])
    batch = replace(_batch(), mirrored=torch.tensor([True, False, True]))
    critic = _critic(_model().eval(), {dog: cat, cat: dog}, samples=6)
    torch.manual_seed(1)
    made, reward_sum, _ = critic.sample(batch, _store().features(batch.feature_rows))
    captions, swap = _captions(made), {dog: cat, cat: dog}
    assert any({dog, cat} & set(caption) for caption in (*captions[:6], *captions[12:]))
    meant = [c if 6 <= row < 12 else [swap.get(w, w) for w in c] for row, c in enumerate(captions)]
    assert reward_sum == pytest.approx(sum(_score((2, 0, 1)[row // 6], c) for row, c in enumerate(meant)))
    as_said = sum(_score((2, 0, 1)[row // 6], c) for row, c in enumerate(captions))
    assert reward_sum != pytest.approx(as_said)


def test_a_sample_is_compared_with_the_others_of_its_image() -> None:
    batch, *_ = _sampled(samples=4)
    rewards = [_score((2, 0, 1)[row // 4], caption) for row, caption in enumerate(_captions(batch))]
    assert len({round(reward, 6) for reward in rewards}) > 3
    assert batch.weights is not None
    for row, weight in enumerate(batch.weights.tolist()):
        others = [rewards[r] for r in range(row // 4 * 4, row // 4 * 4 + 4) if r != row]
        assert weight == pytest.approx(rewards[row] - sum(others) / 3, abs=1e-5)


def test_a_sample_is_compared_with_the_greedy_caption_of_its_image() -> None:
    model = _model().eval()
    batch, *_ = _sampled(model=model, samples=2, baseline="greedy")
    features = _store().features(_batch().feature_rows)
    found = greedy_search(model, features, OPTIONS)
    assert batch.weights is not None
    for row, (caption, weight) in enumerate(zip(_captions(batch), batch.weights.tolist(), strict=True)):
        words = found.tokens[row // 2, 0, : found.lengths[row // 2, 0]].tolist()
        greedy = [*words, 2] if found.ended[row // 2, 0] else words
        image = (2, 0, 1)[row // 2]
        assert weight == pytest.approx(_score(image, caption) - _score(image, greedy), abs=1e-5)


def test_references_may_be_learned_along() -> None:
    plain, *_ = _sampled(samples=2)
    mixed, _, num_samples = _sampled(samples=2, cross_entropy_weight=0.3)
    assert plain.weights is not None
    assert mixed.weights is not None
    samples, references = _captions(plain), _captions(_batch())
    expected = [c for i in range(3) for c in (*samples[2 * i : 2 * i + 2], *references[2 * i : 2 * i + 2])]
    assert _captions(mixed) == expected
    assert num_samples == 6
    weights = [w for i in range(3) for w in (*plain.weights[2 * i : 2 * i + 2].tolist(), 0.3, 0.3)]
    assert mixed.weights.tolist() == pytest.approx(weights)


def test_a_filler_has_no_weight() -> None:
    batch = _batch((1,), filler=True)
    made, reward_sum, num_samples = _critic(_model().eval()).sample(batch, _store().features(batch.feature_rows))
    assert (reward_sum, num_samples, made.num_tokens, made.num_captions) == (0.0, 0, 0, 0)
    assert set(made.lengths) == {0}
    model = _model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = _step(model)(0, [batch])
    assert (report.num_tokens, report.num_samples) == (0, 0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_word_outside_the_vocabulary_is_like_no_other_word() -> None:
    unknown = [[["a", "zebra"], ["a", "yak"]], [["zebra"]]]
    ids = [[caption.tolist() for caption in image] for image in reference_ids(unknown, VOCABULARY)]
    (_, zebra, eos), (_, yak, _) = ids[0]
    assert eos == 2
    assert zebra != yak
    assert min(zebra, yak) >= len(VOCABULARY)
    assert ids[1] == [[zebra, 2]]


def _step(model: CaptionModel, kind: type = torch.optim.SGD, lr: float = 1.0, **section: Any) -> TrainStep:
    accelerator = Accelerator(cpu=True)
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=lr)
    prepared, wrapped = accelerator.prepare(model.eval(), optimizer)
    recipe = Recipe(training={"objective": "scst", "clip_norm": None}, scst=section)
    critic = _critic(model, **section)
    return TrainStep(accelerator, prepared, wrapped, recipe, critic.source, critic)


def test_the_gradient_is_that_of_reinforce() -> None:
    """Caption by caption, word by word, through the step of the search instead of the loss of a batch."""
    model = _model()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    sampled: list[CaptionBatch] = []
    step = _step(model, samples=3)
    prepare = step.objective.prepare

    def watched(step: int, window: Any) -> Any:
        made = prepare(step, window)
        sampled.extend(made.batches)
        return made

    step.objective.prepare = watched  # type: ignore[method-assign]
    report = step(0, [_batch()])
    change = {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}

    naive = _model()
    (batch,) = sampled
    assert batch.weights is not None
    total = torch.zeros((), dtype=torch.float64)
    for row, (caption, weight) in enumerate(zip(_captions(batch), batch.weights.double().tolist(), strict=True)):
        image = int(batch.image_rows[row // 3])
        state, previous = naive.init_state(_store().features(torch.tensor([image]))), 1
        for word in caption:
            logits, _, state = naive.step(torch.tensor([[previous]]), state)
            total = total - weight * F.log_softmax(logits[0, 0], dim=-1)[word]
            previous = word
    (total / batch.num_tokens).backward()
    assert report.num_tokens == batch.num_tokens
    for name, parameter in naive.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            torch.testing.assert_close(change[name], parameter.grad, rtol=0, atol=1e-9)
    assert max(tensor.abs().max().item() for tensor in change.values()) > 1e-4


def test_references_add_to_the_gradient_of_the_reward() -> None:
    def change(weight: float) -> dict[str, Tensor]:
        reset_accelerate()
        model = _model()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        _step(model, samples=3, cross_entropy_weight=weight)(0, [_batch()])
        return {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}

    none, some, much = change(0.0), change(0.5), change(1.0)
    for name, gradient in none.items():
        torch.testing.assert_close(much[name] - gradient, 2 * (some[name] - gradient), rtol=0, atol=1e-9)
    assert max((some[name] - gradient).abs().max().item() for name, gradient in none.items()) > 1e-4


def test_steps_raise_the_reward() -> None:
    model = _model()
    step = _step(model, torch.optim.Adam, lr=0.02, samples=8)
    rewards = []
    for index in range(60):
        report = step(index, [_batch()])
        rewards.append(report.reward_sum / report.num_samples)
        assert report.num_samples == 24
    first, last = np.mean(rewards[:10]), np.mean(rewards[-10:])
    assert last > first + 1.0, (first, last)


def test_other_batches_have_no_reward() -> None:
    model = _model()
    step = _step(model)
    step.objective = CrossEntropy(Recipe())
    report = step(0, [_batch()])
    assert (report.reward_sum, report.num_samples) == (0.0, 0)
