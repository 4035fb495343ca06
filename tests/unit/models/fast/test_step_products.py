"""Gradients put together after the last step are those that autograd adds up step by step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capdist.models.decoder import SoftAttentionDecoder
from capdist.models.fast import step_products
from capdist.models.fast.packing import Packing
from capdist.models.fast.step_products import PLAIN_VARIABLE, StepLinear, StepSigmoidDot, can_defer

COUNTS = (4, 4, 2, 1, 0)  # rows at each step of a loop
LENGTHS = (5, 3, 0, 6)  # words of each caption, two for each image
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@contextmanager
def _plain_forms() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_products, "can_defer", lambda: False)
        yield


def _is_deferred() -> bool:
    """Return whether the fast forms are in use, by the functions that autograd would run backwards."""
    linear, sigmoid = StepLinear(_leaf(3, 5)), StepSigmoidDot(_leaf(4, 6, 5), _leaf(5))
    names = [result.grad_fn.name() for result in (linear(_leaf(4, 5)), sigmoid(_leaf(4, 5)))]
    found = [name in ("_LinearUseBackward", "_SigmoidDotUseBackward") for name in names]
    assert found[0] == found[1]
    return found[0]


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def _loop(apply: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for step, count in enumerate(COUNTS):
        total = total + (apply(inputs[:count] * (step + 1)) ** 2).sum()
    return total


def _linear(weight: Tensor, bias: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return StepLinear(weight, bias), lambda x: F.linear(x, weight, bias)


def _sigmoid_dot(rows: Tensor, vector: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return StepSigmoidDot(rows, vector), lambda x: torch.sigmoid(rows[: len(x)] + x[:, None]) @ vector


CASES = {
    "linear": (_linear, lambda: (_leaf(3, 5), _leaf(3))),
    "linear without bias": (_linear, lambda: (_leaf(3, 5), None)),
    "sigmoid": (_sigmoid_dot, lambda: (_leaf(4, 6, 5), _leaf(5))),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_autograds(case: str) -> None:
    torch.manual_seed(0)
    make, tensors = CASES[case]
    values, inputs = tensors(), _leaf(4, 5)
    wanted = [inputs, *(value for value in values if value is not None)]
    fast, plain = make(*values)
    expected = torch.autograd.grad(_loop(plain, inputs), wanted)
    assert all(gradient.abs().max() > 0.1 for gradient in expected)
    loss = _loop(fast, inputs)
    torch.testing.assert_close(loss, _loop(plain, inputs), rtol=1e-12, atol=1e-12)
    # A pass that stops short of the weights, and a second whole one, change nothing.
    torch.autograd.grad(loss, inputs, retain_graph=True)
    for retain in (True, False):
        found = torch.autograd.grad(loss, wanted, retain_graph=retain)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_frozen_weights_let_gradients_through_to_the_inputs(case: str) -> None:
    make, tensors = CASES[case]
    values = [None if value is None else value.detach() for value in tensors()]
    inputs = _leaf(4, 5)
    fast, plain = make(*values)
    expected = torch.autograd.grad(_loop(plain, inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(_loop(fast, inputs), inputs), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_without_gradients_the_values_are_the_same(case: str) -> None:
    make, tensors = CASES[case]
    values, inputs = tensors(), _leaf(4, 5)
    with torch.no_grad():
        fast, plain = make(*values)
        torch.testing.assert_close(_loop(fast, inputs), _loop(plain, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_two_loops_over_one_graph_add_up(case: str) -> None:
    torch.manual_seed(0)
    make, tensors = CASES[case]
    values, inputs = tensors(), _leaf(4, 5)
    wanted = [inputs, *(value for value in values if value is not None)]
    fast, plain = make(*values)
    found, expected = (
        torch.autograd.grad(_loop(apply, inputs) + 2 * _loop(apply, inputs[:2] * 3), wanted) for apply in (fast, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def _decoder(gate: bool) -> nn.Module:
    torch.manual_seed(1)
    decoder = SoftAttentionDecoder(
        feature_size=5,
        vocab_size=11,
        embed_size=6,
        hidden_size=8,
        attention_size=7,
        dropout=0.0,
        gate=gate,
        tie_weights=False,
        pad_id=0,
    )
    return decoder.double()


def _loss(decoder: nn.Module, features: Tensor, input_ids: Tensor) -> Tensor:
    """Return a loss in which every word and every cell's attention counts differently."""
    states, attention = decoder(features, input_ids, Packing.of(torch.tensor(LENGTHS), 6, features.device))
    logits = decoder.head(states)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    gaze = torch.linspace(-1, 1, attention.numel(), dtype=torch.float64).view_as(attention)
    return (logits.log_softmax(dim=-1) * weights).sum() + (attention * gaze).sum()


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    """Return features (2, 4, 5) and input_ids (4, 6)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    return features.requires_grad_(), torch.randint(1, 11, (4, 6), generator=generator)


def _train(decoder: nn.Module) -> list[Tensor]:
    """Take three steps, and return all losses and gradients on the way."""
    seen: list[Tensor] = []
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for step in range(3):
        first, second = _batch(step), _batch(step + 10)
        with torch.no_grad():
            seen.append(_loss(decoder, *first))
        loss = _loss(decoder, *first) + 2 * _loss(decoder, *second)
        seen += torch.autograd.grad(loss, first[0], retain_graph=True)  # stops short of the weights
        optimizer.zero_grad()
        loss.backward()
        seen += [loss.detach(), first[0].grad, second[0].grad]
        seen += [parameter.grad.clone() for parameter in decoder.parameters()]
        optimizer.step()
    return seen


@pytest.mark.parametrize("gate", [True, False])
def test_a_decoder_trains_alike_with_the_plain_forms(gate: bool) -> None:
    """The loss uses the decoder twice, a pass without gradients and one that stops short come before the whole one."""
    decoder = _decoder(gate)
    other = copy.deepcopy(decoder)
    assert _is_deferred()
    fast = _train(decoder)
    with _plain_forms():
        assert not _is_deferred()
        plain = _train(other)
    assert all(gradient.abs().max() > 1e-3 for gradient in fast)
    torch.testing.assert_close(fast, plain, **EXACT)


def test_a_decoder_trains_in_bfloat16_with_the_plain_forms() -> None:
    decoder = _decoder(gate=True).float()
    features, input_ids = _batch(0)
    found = []
    for use in (_plain_forms, torch.enable_grad):
        with use(), torch.autocast("cpu", torch.bfloat16):
            loss = _loss(decoder, features.float(), input_ids)
        decoder.zero_grad()
        loss.backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in decoder.parameters()]))
    plain, fast = found
    assert (fast - plain).norm() < 0.02 * plain.norm()


@pytest.fixture
def _fresh_answer() -> Iterator[None]:
    can_defer.cache_clear()
    yield
    can_defer.cache_clear()


@pytest.mark.usefixtures("_fresh_answer")
def test_this_torch_numbers_its_backward_passes(caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        assert can_defer()
    assert not caplog.messages


TORCHS_OWN = torch._C._current_graph_task_id


class _Counter:
    """A function of torch that gives another number at every call."""

    number = -2

    def __call__(self) -> int:
        self.number += 1
        return self.number


@pytest.mark.parametrize(
    "function",
    [None, lambda: -1, lambda: 7, _Counter(), lambda: None, lambda must_be_given: 7, lambda: TORCHS_OWN() + 6],
    ids=["missing", "always outside", "always the same", "never the same", "no number", "other arguments"]
    + ["another number outside"],
)
@pytest.mark.usefixtures("_fresh_answer")
def test_a_torch_without_these_numbers_gets_the_plain_forms(
    function: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if function is None:
        monkeypatch.delattr(torch._C, "_current_graph_task_id")
    else:
        monkeypatch.setattr(torch._C, "_current_graph_task_id", function)
    assert not _is_deferred()
    assert not _is_deferred()
    (message,) = caplog.messages
    assert torch.__version__ in message
    decoder = _decoder(gate=True)
    _loss(decoder, *_batch(0)).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in decoder.parameters())


@pytest.mark.parametrize(("value", "expected"), [("1", False), ("", True)])
@pytest.mark.usefixtures("_fresh_answer")
def test_the_environment_can_ask_for_the_plain_forms(
    value: str, expected: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(PLAIN_VARIABLE, value)
    with caplog.at_level(logging.WARNING):
        assert _is_deferred() is expected
    assert not caplog.messages
