"""Gradients of tensors that a loop uses at every step, put together once, after its last step.

Autograd adds up one full-sized gradient a step: for an LSTM, twenty products of a few rows each and twenty passes over
matrices of many megabytes. The sum is the same in one large product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _PassSums(list[Any]):
    """What the uses of a tensor hand over in one backward pass; nothing is left of one that stopped short of it."""

    def of_this_pass(self) -> list[Any]:
        task = torch._C._current_graph_task_id()
        if task != getattr(self, "task", None):
            self.clear()
        self.task = task
        return self


class StepLinear:
    """A linear layer that a loop applies at each step.

    Args:
        weight: (out, in).
        bias: (out,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        device = weight.device.type
        if torch.is_autocast_enabled(device):  # once, not at every step
            dtype = torch.get_autocast_dtype(device)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self._uses = _PassSums()
        self.weight, self.bias = weight, bias
        self._is_deferred = torch.is_grad_enabled() and weight.requires_grad
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
    """Hands out weight and bias. Autograd comes back here when it has been through all their uses."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, uses: _PassSums) -> tuple[Any, Any]:
        ctx.uses = uses
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: None) -> tuple[Tensor | None, Tensor | None, None]:
        columns = zip(*ctx.uses.of_this_pass(), strict=True)
        inputs, grads = (torch.cat([part.flatten(0, -2) for part in column]) for column in columns)
        ctx.uses.clear()
        of_weight, of_bias, _ = ctx.needs_input_grad
        return grads.T @ inputs if of_weight else None, grads.sum(dim=0) if of_bias else None, None


class _LinearUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, uses: _PassSums) -> Tensor:
        ctx.uses = uses
        ctx.save_for_backward(inputs, weight)
        return F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        inputs, weight = ctx.saved_tensors
        ctx.uses.of_this_pass().append((inputs, grad))
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None


class StepSigmoidDot:
    """`sigmoid(rows + shift) @ vector` with another shift, and no more rows than before, at each step of a loop.

    Args:
        rows: (R, N, A).
        vector: (A,).
    """

    def __init__(self, rows: Tensor, vector: Tensor) -> None:
        self._sum = _PassSums()
        self.rows, self.vector = rows, vector.to(rows.dtype)
        if torch.is_grad_enabled() and rows.requires_grad:
            self.rows = _SharedRows.apply(rows, self.vector, self._sum)

    def __call__(self, shift: Tensor) -> Tensor:
        """Return (r, N) of the first r rows for shift (r, A)."""
        scores: Tensor = _SigmoidDotUse.apply(self.rows, shift, self.vector, self._sum)
        return scores


class _SharedRows(torch.autograd.Function):
    """Hands out rows, whose gradient is `vector` times what the uses have summed up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, vector: Tensor, total: _PassSums) -> Tensor:
        ctx.total = total
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(vector)
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> tuple[Tensor, None, None]:
        (vector,) = ctx.saved_tensors
        return ctx.total.of_this_pass().pop().mul_(vector).to(vector.dtype), None, None


class _SigmoidDotUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shift: Tensor, vector: Tensor, total: _PassSums) -> Tensor:
        values = torch.add(rows[: len(shift)], shift.unsqueeze(1)).sigmoid_()
        ctx.total, ctx.num_rows = total, len(rows)
        ctx.save_for_backward(values, vector)
        return values @ vector

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
        values, vector = ctx.saved_tensors
        slopes = torch.addcmul(values, values, values, value=-1)
        if ctx.needs_input_grad[0]:
            total = ctx.total.of_this_pass()
            if not total:
                # Sums of many steps: float32 even where a step is computed in less.
                dtype = torch.promote_types(values.dtype, torch.float32)
                total.append(values.new_zeros(ctx.num_rows, *values.shape[1:], dtype=dtype))
            total[0][: len(values)].addcmul_(grad.unsqueeze(-1), slopes)
        of_shift = torch.bmm(grad.unsqueeze(1), slopes).squeeze(1) * vector
        return None, of_shift, grad.flatten() @ values.flatten(0, 1), None
