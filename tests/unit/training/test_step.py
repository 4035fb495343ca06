"""The step with a real accelerator: one gradient however a window is split, clean failures, dropout by name."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from capdist.data.batches import CaptionBatch, Collator, Sample
from capdist.data.images import Preprocessing
from capdist.distributed.launch import build_accelerator
from capdist.errors import NumericsError
from capdist.features.source import EncodedPhotos, FeatureSource, StoredFeatures
from capdist.features.store import FeatureStore
from capdist.models.caption_model import CaptionModel
from capdist.recipe.sections import Recipe
from capdist.training.objectives import CrossEntropy, cross_entropy, doubly_stochastic, word_presence
from capdist.training.step import MOST_SKIPPED_STEPS, TrainStep
from tests.conftest import reset_accelerate
from tests.models import read, tiny_model

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

VOCABULARY, CHANNELS, CELLS, IMAGES, ROWS = 13, 6, 4, 6, 3
LENGTHS = ((3, 7, 1), (5,), (), (2, 2), (9, 1, 4), (6,))  # words of each image's captions; one image has none
PREPROCESSING = Preprocessing(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class _DoubleStore(FeatureStore):
    """Features for a model in float64."""

    def features(self, rows: Tensor) -> Tensor:
        return super().features(rows).double()


def _features() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(IMAGES, CELLS, CHANNELS)).astype(np.float16)


def _model(dropout: float = 0.0, **encoder: Any) -> CaptionModel:
    layers = OrderedDict(layer1=nn.Conv2d(3, CHANNELS, 4, stride=4), bn1=nn.BatchNorm2d(CHANNELS))
    model = tiny_model(
        channels=CHANNELS, vocab_size=VOCABULARY, projection=5, layers=layers, encoder=encoder,
        dropout=dropout, gate=True, tie_weights=True,
    )  # fmt: skip
    model.add_word_head(dropout)
    return model.double()


def _samples(images: Sequence[int], *, photos: bool = False) -> CaptionBatch:
    samples = []
    for image in images:
        generator = torch.Generator().manual_seed(image)
        captions = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in LENGTHS[image]]
        pixels = torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=generator) if photos else None
        samples.append(Sample(image, image, pixels, captions))
    batch = Collator(ROWS)(samples)
    assert isinstance(batch, CaptionBatch)
    return batch


def _filler(images: Sequence[int]) -> CaptionBatch:
    batch = Collator(ROWS)([Sample(image, image, None, []) for image in images])
    assert isinstance(batch, CaptionBatch)
    return batch


def _recipe(seed: int = 0, **training: Any) -> Recipe:
    settings = {"clip_norm": None, "label_smoothing": 0.1, "doubly_stochastic": 0.3, "word_presence": 0.2} | training
    return Recipe(run={"seed": seed}, training=settings)


def _step(
    model: CaptionModel, recipe: Recipe | None = None, *, features: Any = None, optimizer: Any = None
) -> tuple[TrainStep, torch.optim.Optimizer]:
    """Return a step whose plain gradient descent of rate 1 makes the change of the weights minus the gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(parameters, lr=1.0)
    accelerator = Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model.train(), optimizer)
    source = _stored(_DoubleStore(_features() if features is None else features))
    return _train_step(accelerator, prepared, wrapped, source, recipe), optimizer


def _stored(store: FeatureStore) -> StoredFeatures:
    return StoredFeatures(store, torch.device("cpu"))


def _train_step(
    accelerator: Accelerator, model: Any, optimizer: Any, source: FeatureSource, recipe: Recipe | None = None
) -> TrainStep:
    recipe = recipe or _recipe()
    return TrainStep(accelerator, model, optimizer, recipe, source, CrossEntropy(recipe))


def _loss(model: CaptionModel, batch: CaptionBatch, features: Tensor) -> Tensor:
    """Return the loss of `_recipe`."""
    output, labels = read(model, batch.input_ids, batch.labels, features=features), batch.labels
    smoothed = cross_entropy(output, labels, label_smoothing=0.1)
    return smoothed + 0.3 * doubly_stochastic(output, labels) + 0.2 * word_presence(output, labels)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def _gradient(
    window: Sequence[CaptionBatch], *, step: int = 0, recipe: Recipe | None = None, dropout: float = 0.0
) -> dict[str, Tensor]:
    reset_accelerate()
    model = _model(dropout)
    train_step, _ = _step(model, recipe)
    before = _weights(model)
    train_step(step, window)
    return {name: before[name] - parameter for name, parameter in _weights(model).items()}


def _norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((values**2).sum()) for values in gradient.values()))


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def _expected_gradient() -> dict[str, Tensor]:
    """Differentiate the loss of all captions at once, divided by all their words, without any of the step's code."""
    model = _model()
    batch = _samples(range(IMAGES))
    features = torch.from_numpy(_features()).double()
    words = sum(sum(lengths) for lengths in LENGTHS)
    (_loss(model, batch, features) / words).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "split",
    [
        [[0, 1, 2, 3, 4, 5]],
        [[0, 1, 2], [3, 4, 5]],
        [[4], [0, 2, 5, 3], [1]],
        [[5, 4, 3, 2, 1, 0]],
        [[0], [1], [2], [3], [4], [5]],
        [[2], [0, 1, 3, 4, 5]],
    ],
    ids=str,
)
def test_gradient_does_not_depend_on_the_split(split: list[list[int]]) -> None:
    """Averaging the micro-batches' own means would weigh a word by the company it keeps."""
    gradient = _gradient([_samples(images) for images in split])
    expected = _expected_gradient()
    assert _norm(expected) > 0.1
    for name, values in expected.items():
        torch.testing.assert_close(gradient[name], values, rtol=1e-5, atol=1e-8)


def test_fillers_change_nothing() -> None:
    plain = _gradient([_samples([0, 1]), _samples([3])])
    filled = _gradient([_samples([0, 1]), _filler([2, 5]), _samples([3]), _filler([0])])
    for name, values in plain.items():
        torch.testing.assert_close(filled[name], values, rtol=1e-9, atol=1e-12)


def test_accumulation_of_the_environment_is_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --gradient_accumulation_steps 4` must neither divide the loss nor skip steps."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model = _model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    accelerator = build_accelerator()
    prepared, wrapped = accelerator.prepare(model.train(), optimizer)
    before = _weights(model)
    step = _train_step(accelerator, prepared, wrapped, _stored(_DoubleStore(_features())))
    step(0, [_samples([0, 1, 2]), _samples([3, 4, 5])])
    for name, values in _expected_gradient().items():
        torch.testing.assert_close(before[name] - model.get_parameter(name), values, rtol=1e-5, atol=1e-8)


def test_report_counts_the_whole_window() -> None:
    model = _model()
    step, _ = _step(model)
    window = [_samples([0, 1]), _samples([2]), _samples([4])]
    store = _DoubleStore(_features())
    with torch.no_grad():
        expected = sum(float(_loss(model, batch, store.features(batch.feature_rows))) for batch in window)
    report = step(0, window)
    assert report.num_tokens == 3 + 7 + 1 + 5 + 9 + 1 + 4
    assert report.num_captions == 3 + 1 + 0 + 3
    assert report.loss_sum.item() == pytest.approx(expected, rel=1e-6)
    assert report.stop is False
    assert step(1, window, stop_requested=True).stop
    assert not step(2, window).stop


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_poisoned_features_raise_and_leave_the_weights(poison: float, clip_norm: float | None, kind: type) -> None:
    features = _features()
    features[4, 1, 2] = poison
    model = _model()
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step, _ = _step(model, _recipe(clip_norm=clip_norm), features=features, optimizer=optimizer)
    step(0, [_samples([0, 1])])
    before = _bits(model)
    state = [(k, {n: t.clone() for n, t in v.items()}) for k, v in optimizer.state_dict()["state"].items() if v]
    with pytest.raises(NumericsError, match="step 8") as caught:
        step(7, [_samples([0, 1]), _samples([4]), _samples([5])])
    assert len(caught.value.lines) == 1
    assert "training.learning_rate" in str(caught.value)
    assert _bits(model) == before
    for index, tensors in state:
        now = optimizer.state_dict()["state"][index]
        assert all(torch.equal(now[name], tensor) for name, tensor in tensors.items())

    step(7, [_samples([0, 3])])  # nothing of the poison is left in the gradients
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert _bits(model) != before


@pytest.mark.parametrize("share", [0.01, 0.5, 2.0])
def test_clip_norm_is_of_all_gradients_of_the_step_together(share: float) -> None:
    window = [_samples([0, 1, 2]), _samples([3, 4, 5])]
    plain = _gradient(window)
    limit = share * _norm(plain)
    clipped = _gradient(window, recipe=_recipe(clip_norm=limit))
    factor = min(1.0, share)
    assert _norm(clipped) == pytest.approx(factor * _norm(plain), rel=1e-4)
    for name, values in plain.items():
        torch.testing.assert_close(clipped[name], factor * values, rtol=1e-4, atol=1e-9)


def test_dropout_follows_from_seed_step_and_micro_batch_alone() -> None:
    window = [_samples([0, 1]), _samples([3, 4])]
    gradient = _gradient(window, step=5, dropout=0.5)
    torch.manual_seed(99)
    torch.rand(7)
    assert _same(gradient, _gradient(window, step=5, dropout=0.5))
    assert not _same(gradient, _gradient(window, step=6, dropout=0.5))
    assert not _same(gradient, _gradient(window, step=5, dropout=0.5, recipe=_recipe(seed=1)))


def test_micro_batches_drop_different_words() -> None:
    """With one mask for both, twice the same batch would have the gradient of once."""
    once, twice = _samples([0, 1]), [_samples([0, 1])] * 2
    assert not torch.allclose(
        _gradient([once], dropout=0.5)["projection.weight"],
        _gradient(twice, dropout=0.5)["projection.weight"],
        rtol=1e-3,
    )
    torch.testing.assert_close(_gradient([once])["projection.weight"], _gradient(twice)["projection.weight"])


def test_dropout_of_a_micro_batch_does_not_depend_on_the_one_before() -> None:
    small = _gradient([_filler([2]), _samples([0, 1])], dropout=0.5)
    large = _gradient([_filler([2, 3, 4, 5]), _samples([0, 1])], dropout=0.5)
    assert _same(small, large)
    assert not _same(small, _gradient([_samples([0, 1]), _filler([2])], dropout=0.5))


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_warm_up_changes_nothing(batch_norm: Any) -> None:
    model = _model(trainable_from="all", batch_norm=batch_norm).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    accelerator = Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model.train(), optimizer)
    step = _train_step(accelerator, prepared, wrapped, EncodedPhotos([], PREPROCESSING, accelerator))
    before = _bits(model)
    step.warm_up(_samples([0, 1], photos=True))
    assert _bits(model) == before
    assert optimizer.state_dict()["state"] == {}
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    step(0, [_samples([0, 1], photos=True)])
    moved = {name for name, bits in _bits(model).items() if bits != before[name]}
    assert {"encoder.network.layer1.weight", "encoder.network.bn1.weight", "decoder.lstm.weight_hh"} <= moved
    assert ("encoder.network.bn1.running_mean" in moved) == (batch_norm == "train")


def test_photos_and_their_features_give_the_same_step() -> None:
    """A frozen encoder in the step, or in the store that it filled before."""
    after = []
    for cached in (False, True):
        reset_accelerate()
        model = _model().float().train()
        batch = _samples([0, 3, 5], photos=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        accelerator = Accelerator(cpu=True)
        source: FeatureSource = EncodedPhotos([], PREPROCESSING, accelerator)
        if cached:
            array = np.zeros((IMAGES, CELLS, CHANNELS), dtype=np.float32)
            assert batch.images is not None
            array[[0, 3, 5]] = model.encode((batch.images.float() / 255 - 0.5) / 0.25).numpy()
            source = _stored(FeatureStore(array))
        prepared, wrapped = accelerator.prepare(model, optimizer)
        _train_step(accelerator, prepared, wrapped, source)(0, [batch])
        after.append(_weights(model))
    for name, values in after[0].items():
        torch.testing.assert_close(after[1][name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_whose_every_fp16_step_overflows_is_ended(fused: bool) -> None:
    """The scaler of fp16, here on a CPU: the loss is infinite times its scale, whatever the scale."""
    model = _model().float()
    features = _features().astype(np.float32)
    features[:] = 3e38
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    prepared, wrapped = accelerator.prepare(model.train(), optimizer)
    step = _train_step(accelerator, prepared, wrapped, _stored(FeatureStore(features)))
    before = _weights(model)
    batch = _samples([0, 1])
    for index in range(MOST_SKIPPED_STEPS):
        step(index, [batch])
    with pytest.raises(NumericsError, match="fp16 overflowed in 31 steps"):
        step(MOST_SKIPPED_STEPS, [batch])
    for name, weights in _weights(model).items():
        assert torch.equal(weights, before[name]), name
