"""Times functions that run in turns, so that other work on the machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

KINDS = (
    ("matrix products", ("mm", "addmm", "bmm", "baddbmm", "addmv", "addmv_", "mv", "linear")),
    ("convolutions", ("convolution", "mkldnn_convolution", "cudnn_convolution", "convolution_backward")),
    ("attention, element by element", ("sigmoid_", "addcmul", "addcmul_", "_softmax", "_softmax_backward_data")),
    ("optimizer", ("_fused_adam_", "_fused_adamw_", "linalg_vector_norm", "_foreach_mul_", "_foreach_norm")),
    ("loss", ("_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward")),
    ("dropout", ("bernoulli_", "native_dropout", "native_dropout_backward", "div_")),
    ("moving and clearing memory", ("copy_", "fill_", "zero_", "cat", "index", "index_put_", "_index_put_impl_",
                                    "index_copy_", "index_add_", "index_select", "gather")),
)  # fmt: skip
"""Kinds of work in a step, and the torch operators of each; all other operators are `other operators`."""


@dataclass(frozen=True)
class Timing:
    """How long a function took.

    Attributes:
        seconds: How long each call took, in their order.
        flops: Number of floating point operations in the matrix products and convolutions of one call.
    """

    seconds: tuple[float, ...]
    flops: float

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)


def time_in_turns(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    flops: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Call each function once to warm up and to count its work, then all of them in turns.

    Args:
        functions: Functions to time, by name; one call of each should take about as long as one of the others.
        repeats: How often each function is timed.
        device: Must finish its work before each reading of the clock.
        flops: Operations of one call, for functions whose work is known, or cannot be counted because they are
            compiled.
    """
    known = dict(flops or {})
    for name, function in functions.items():
        if name in known:
            function()
        else:
            known[name] = count_flops(function)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(time_once(function, device))
    return {name: Timing(tuple(values), known[name]) for name, values in seconds.items()}


def time_once(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call."""
    _wait_for(device)
    started = time.perf_counter()
    function()
    _wait_for(device)
    return time.perf_counter() - started


def count_flops(function: Callable[[], object], calls: int = 1) -> float:
    """Return the floating point operations in the matrix products and convolutions of a call, the mean of `calls`."""
    # torch does not count products with a vector.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: _count_mv}) as counter:
        for _ in range(calls):
            function()
    return float(counter.get_total_flops()) / calls


def _count_mv(matrix: torch.Size, vector: torch.Size, *_: object, **__: object) -> int:
    return 2 * matrix[0] * vector[0]


def matrix_product(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that multiplies square matrices: the fastest work of a device, a ceiling for all other work."""
    side = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(2):  # so that it takes longer than a reading of the clock
            torch.mm(left, right)

    return multiply


def shares_of_time(function: Callable[[], object], device: torch.device, trace: Path | None = None) -> dict[str, float]:
    """Return the share of one call's time that each kind of work took; `outside operators` is mostly Python.

    Args:
        function: Called once to warm up, and once to measure.
        device: On a GPU its kernels are counted, not their launches; they may sum to less than the time.
        trace: File that the trace is written to; Perfetto or `chrome://tracing` can read it.
    """
    function()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        total = time_once(function, device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        micros = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if event.key.startswith("aten::"):
            kind = _kind(event.key.removeprefix("aten::"))
            spent[kind] = spent.get(kind, 0.0) + micros / 1e6 / total
    shares = dict(sorted(spent.items(), key=lambda item: -item[1]))
    return shares | {"outside operators": max(0.0, 1 - sum(shares.values()))}


def _kind(operator: str) -> str:
    return next((kind for kind, operators in KINDS if operator in operators), "other operators")


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
