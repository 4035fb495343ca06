"""Rates and groups of the optimizer, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from capdist.models.caption_model import CaptionModel
from capdist.recipe.sections import TrainingSection
from capdist.training.optimization import build_optimizer, schedule, set_learning_rate
from tests.models import tiny_model


def _model(*, tied: bool = False, trainable_from: str | None = None) -> CaptionModel:
    layers = OrderedDict(layer1=nn.Conv2d(3, 4, 1), layer2=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    return tiny_model(
        channels=4, projection=3, layers=layers, encoder={"trainable_from": trainable_from}, tie_weights=tied
    )


def _settings(model: CaptionModel, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Return rate and decay by parameter name; a parameter in two groups is a mistake."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        assert group["lr"] == group["peak_lr"]
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = group["lr"], group["weight_decay"]
    return found


@pytest.mark.parametrize(
    ("step", "total", "warmup", "kind", "expected"),
    [
        (0, 100, 0, "constant", 1.0),
        (99, 100, 0, "constant", 1.0),
        (0, 100, 4, "constant", 0.25),
        (1, 100, 4, "constant", 0.5),
        (3, 100, 4, "constant", 1.0),
        (4, 100, 4, "constant", 1.0),
        (0, 100, 0, "cosine", 1.0),
        (25, 100, 0, "cosine", (1 + math.sqrt(0.5)) / 2),
        (50, 100, 0, "cosine", 0.5),
        (75, 100, 0, "cosine", (1 - math.sqrt(0.5)) / 2),
        (100, 100, 0, "cosine", 0.0),
        (0, 110, 10, "cosine", 0.1),
        (9, 110, 10, "cosine", 1.0),
        (10, 110, 10, "cosine", 1.0),
        (60, 110, 10, "cosine", 0.5),
        (0, 1, 0, "cosine", 1.0),
        (0, 1, 1, "cosine", 1.0),
        (0, 5, 50, "cosine", 0.02),
        (4, 5, 50, "cosine", 0.1),
    ],
)
def test_schedule_by_hand(step: int, total: int, warmup: int, kind: str, expected: float) -> None:
    assert schedule(step, total, warmup, kind) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_rate_rises_once_and_never_again(warmup: int, kind: str) -> None:
    factors = [schedule(step, 40, warmup, kind) for step in range(40)]
    peak = max(warmup - 1, 0)
    assert factors[peak] == 1
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert min(factors) > 0  # no step is wasted


def test_cosine_is_torchs_own() -> None:
    """Without warm-up it is `CosineAnnealingLR`."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    for step in range(30):
        assert schedule(step, 30, 0, "cosine") == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trainable_from", [None, "layer2", "all"])
def test_groups_under_adamw(tied: bool, trainable_from: str | None) -> None:
    encoder_rate = 1e-5 if trainable_from else None
    training = TrainingSection(
        optimizer="adamw", weight_decay=0.2, learning_rate=1e-3, encoder_learning_rate=encoder_rate
    )
    model = _model(tied=tied, trainable_from=trainable_from)
    optimizer = build_optimizer(model, training)
    assert type(optimizer) is torch.optim.AdamW
    frozen = {None: ("encoder.",), "layer2": ("encoder.network.layer1.",), "all": ("nothing",)}[trainable_from]
    expected = {}
    for name, _ in model.named_parameters():  # a tied matrix is listed once, as the embedding's
        if not name.startswith(frozen):
            is_exempt = "bias" in name or name in ("decoder.embedding.weight", "encoder.network.layer2.1.weight")
            expected[name] = (1e-5 if name.startswith("encoder.") else 1e-3, 0.0 if is_exempt else 0.2)
    assert ("decoder.head.weight" in expected) != tied
    assert expected["decoder.lstm.weight_hh"] == (1e-3, 0.2)
    assert _settings(model, optimizer) == expected


def test_encoder_learns_at_the_common_rate_unless_told_otherwise() -> None:
    model = _model(trainable_from="all")
    optimizer = build_optimizer(model, TrainingSection(learning_rate=0.5))
    assert {lr for lr, _ in _settings(model, optimizer).values()} == {0.5}


@pytest.mark.parametrize("tied", [False, True])
def test_adam_takes_no_decay(tied: bool) -> None:
    """With no gradient a step of Adam without decay moves nothing; one of AdamW shrinks the matrices alone."""
    moved = {}
    for name in ("adam", "adamw"):
        model = _model(tied=tied)
        training = TrainingSection(optimizer=name, weight_decay=1.0, learning_rate=0.1)
        optimizer = build_optimizer(model, training)
        assert type(optimizer) is {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moved[name] = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
        for key in moved[name]:
            torch.testing.assert_close(model.get_parameter(key), before[key] * 0.9)
    assert moved["adam"] == set()
    assert {"decoder.lstm.weight_ih", "projection.weight"} <= moved["adamw"]
    assert not any("bias" in key or "embedding" in key or "encoder" in key for key in moved["adamw"])


@pytest.mark.parametrize("order", [range(20), reversed(range(20)), [19, 3, 3, 0]], ids=["up", "down", "anyhow"])
def test_rates_are_a_function_of_the_step_alone(order: Any) -> None:
    training = TrainingSection(
        learning_rate=0.4, encoder_learning_rate=0.02, warmup_steps=5, schedule="cosine", weight_decay=0.1
    )
    model = _model(trainable_from="layer2")
    optimizer = build_optimizer(model, training)
    for step in order:
        set_learning_rate(optimizer, training, step, 20)
        factor = (step + 1) / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * (step - 5) / 15))
        rates = {group["peak_lr"]: group["lr"] for group in optimizer.param_groups}
        assert rates == {0.4: pytest.approx(0.4 * factor), 0.02: pytest.approx(0.02 * factor)}
