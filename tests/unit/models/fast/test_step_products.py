"""Deferred gradients against those that autograd adds up step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from capdist.models.fast.step_products import StepLinear, StepSigmoidDot

COUNTS = (4, 4, 2, 1, 0)  # rows at each step of a loop


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
