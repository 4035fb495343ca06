"""Products with a tensor that every step of a loop uses. Its gradient is put together once, after the last step.

Autograd computes a full-sized gradient at every step and adds them up. For an LSTM that reads twenty words, that is
twenty products of a few rows each, and twenty passes over matrices of many megabytes. One large product of all rows
gives the same sum.

The shared tensor first goes through a function that returns it unchanged (`_SharedWeights`, `_SharedRows`). In the
backward pass, each step only leaves behind what its share of the gradient is made of. Autograd calls the backward of
the shared function when it is through with all steps, and there the gradient is computed.

The plain forms are `F.linear(inputs, weight, bias)` and `sigmoid(rows + shift) @ vector`. The fast forms give the same
values and gradients, but only first derivatives.

They need one function that torch does not document: `torch._C._current_graph_task_id()`, the number of the backward
pass that is under way. A pass may stop before it reaches the shared tensor, as `torch.autograd.grad(loss, inputs)`
does. What the steps left behind then must not count in the next pass, and the number tells the two apart.
`torch.utils.checkpoint` uses the same function for the same purpose. `can_defer` tries it out before it is first
needed. If it is missing or behaves in another way, both classes use the plain form.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

logger = logging.getLogger(__name__)

PLAIN_VARIABLE = "CAPDIST_PLAIN_STEP_PRODUCTS"
"""Environment variable that asks for the plain forms, to compare with."""


@cache
def can_defer() -> bool:
    """Return whether gradients can be put together after the last step; else the plain forms are used."""
    if os.environ.get(PLAIN_VARIABLE):
        return False
    if not _passes_are_numbered():
        logger.warning(f"torch {torch.__version__} does not number backward passes as expected: decoders train slower")
        return False
    return True


def _passes_are_numbered() -> bool:
    """Return whether a backward pass has one number, the next pass another, and code outside of a pass -1."""
    try:
        outside = torch._C._current_graph_task_id()
        (first, again), (second, _) = _numbers_of_a_pass(), _numbers_of_a_pass()
    except Exception:  # a private function may go, or change in any way
        return False
    return outside == -1 and first == again and len({outside, first, second}) == 3


@torch.enable_grad()
def _numbers_of_a_pass() -> list[int]:
    """Return the number of a small backward pass as two places in it see it."""
    numbers: list[int] = []
    value = leaf = torch.zeros((), device="cpu", requires_grad=True)
    for _ in range(2):
        value = value * 1
        value.register_hook(lambda _: numbers.append(torch._C._current_graph_task_id()))
    torch.autograd.grad(value, leaf)
    return numbers


class _PassList(list[Any]):
    """What the steps of one backward pass leave behind for its end."""

    number = -1

    def of_this_pass(self) -> _PassList:
        """Return this list without what an earlier pass has put there."""
        number = torch._C._current_graph_task_id()
        if number != self.number:
            self.clear()
        self.number = number
        return self


class StepLinear:
    """A linear layer that a loop applies at each step.

    Args:
        weight: (out, in).
        bias: (out,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        device = weight.device.type
        # Autocast remembers its casts of parameters only. A weight put together from parameters it would cast at every
        # step.
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self._uses = _PassList()
        self.weight, self.bias = weight, bias
        # The search has no gradients: there, and with frozen weights, nothing is to be put together.
        self._is_deferred = torch.is_grad_enabled() and weight.requires_grad and can_defer()
        if self._is_deferred:
            self.weight, self.bias = _SharedWeights.apply(weight, bias, self._uses)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return (…, out) for inputs (…, in)."""
        inputs = inputs.to(self.weight.dtype)
        if not self._is_deferred:
            return F.linear(inputs, self.weight, self.bias)
        output: Tensor = _LinearUse.apply(inputs, self.weight, self.bias, self._uses)
        return output


class _SharedWeights(torch.autograd.Function):
    """Returns weight and bias unchanged. Its backward runs after those of all their uses."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, uses: _PassList) -> tuple[Any, Any]:
        ctx.uses = uses
        # The uses hand back None for the weights. Autograd would make it zeros of their size.
        ctx.set_materialize_grads(False)
        # Views share the memory, and autograd can attach this function to them.
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: None) -> tuple[Tensor | None, Tensor | None, None]:
        columns = zip(*ctx.uses.of_this_pass(), strict=True)
        inputs, grads = (torch.cat([part.flatten(0, -2) for part in column]) for column in columns)
        # A graph that is kept for another pass would keep these tensors, too.
        ctx.uses.clear()
        of_weight, of_bias, _ = ctx.needs_input_grad
        # The sum over steps of gradᵀ·input is one product of all rows, whichever step they are from.
        return grads.T @ inputs if of_weight else None, grads.sum(dim=0) if of_bias else None, None


class _LinearUse(torch.autograd.Function):
    """One step: `F.linear`, whose backward leaves the weights' gradient to `_SharedWeights`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, uses: _PassList) -> Tensor:
        ctx.uses = uses
        ctx.save_for_backward(inputs, weight)
        return F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        inputs, weight = ctx.saved_tensors
        ctx.uses.of_this_pass().append((inputs, grad))
        # The step before waits for this gradient, so it cannot be put off.
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None


class StepSigmoidDot:
    """`sigmoid(rows + shift) @ vector` at each step of a loop, with another shift and no more rows than before.

    Args:
        rows: (R, N, A).
        vector: (A,).
    """

    def __init__(self, rows: Tensor, vector: Tensor) -> None:
        self._sum = _PassList()
        self.rows, self.vector = rows, vector.to(rows.dtype)
        self._is_deferred = torch.is_grad_enabled() and rows.requires_grad and can_defer()
        if self._is_deferred:
            self.rows = _SharedRows.apply(rows, self.vector, self._sum)

    def __call__(self, shift: Tensor) -> Tensor:
        """Return (r, N) of the first r rows for shift (r, A)."""
        if not self._is_deferred:
            return _sigmoids(self.rows, shift) @ self.vector
        scores: Tensor = _SigmoidDotUse.apply(self.rows, shift, self.vector, self._sum)
        return scores


def _sigmoids(rows: Tensor, shift: Tensor) -> Tensor:
    # In place: these (r, N, A) numbers are the largest of a step.
    return torch.add(rows[: len(shift)], shift.unsqueeze(1)).sigmoid_()


class _SharedRows(torch.autograd.Function):
    """Returns the rows unchanged. Their gradient is `vector` times what the uses have added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, vector: Tensor, total: _PassList) -> Tensor:
        ctx.total = total
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(vector)
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> tuple[Tensor, None, None]:
        (vector,) = ctx.saved_tensors
        # Every step's share has the factor `vector`: it is multiplied in once. Nobody else reads the sum, so in place.
        return ctx.total.of_this_pass().pop().mul_(vector).to(vector.dtype), None, None


class _SigmoidDotUse(torch.autograd.Function):
    """One step, whose backward adds its share of the rows' gradient to a sum that all steps have."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shift: Tensor, vector: Tensor, total: _PassList) -> Tensor:
        values = _sigmoids(rows, shift)
        ctx.total, ctx.num_rows = total, len(rows)
        ctx.save_for_backward(values, vector)
        return values @ vector

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
        values, vector = ctx.saved_tensors
        # The slope of a sigmoid is s − s², from its value alone: the sum under it was not kept.
        slopes = torch.addcmul(values, values, values, value=-1)
        total = ctx.total.of_this_pass()
        # The first step of a pass makes room for all rows; the steps after it add in place.
        if not total:
            # A sum of many small numbers needs float32 even where a step is computed in less.
            dtype = torch.promote_types(values.dtype, torch.float32)
            total.append(values.new_zeros(ctx.num_rows, *values.shape[1:], dtype=dtype))
        total[0][: len(values)].addcmul_(grad.unsqueeze(-1), slopes)
        of_shift = torch.bmm(grad.unsqueeze(1), slopes).squeeze(1) * vector
        return None, of_shift, grad.flatten() @ values.flatten(0, 1), None
