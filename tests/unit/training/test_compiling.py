"""When the encoder that fills the cache is compiled."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from capdist.features import compiling
from capdist.features.compiling import CompilingEncoder

BATCH = torch.ones(4, 3, 2, 2)


class _Encoder:
    """Stands in for an `EncoderPass`, whose own compiling is tested with it."""

    def __init__(self, problem: str | None = None) -> None:
        self.problem, self.calls, self.compiled_at = problem, 0, list[int]()

    def __call__(self, pixel_values: Tensor) -> Tensor:
        self.calls += 1
        return pixel_values.flatten(2)

    def compile(self, pixel_values: Tensor) -> str | None:
        assert torch.equal(pixel_values, BATCH)
        self.compiled_at.append(self.calls)
        return self.problem


def _encode(encoder: _Encoder, mode: str, batches: int = 6) -> None:
    passing: Any = encoder
    compiling_encoder = CompilingEncoder(passing, mode)
    for remaining in range(batches, 0, -1):
        features = compiling_encoder(BATCH, 4 * remaining)
        assert torch.equal(features, BATCH.flatten(2))


@pytest.mark.parametrize(
    ("mode", "worth_it_s", "expected"),
    [("on", 1e9, [0]), ("off", 0.0, []), ("auto", 0.0, [2]), ("auto", 1e9, [])],
)
def test_it_is_compiled_once_or_never(
    mode: str, worth_it_s: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` has seen two batches by then: the first of them was warming up."""
    monkeypatch.setattr(compiling, "WORTH_IT_S", worth_it_s)
    encoder = _Encoder()
    _encode(encoder, mode)
    assert encoder.compiled_at == expected
    assert encoder.calls == 6


def test_cost_and_gain_are_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiling, "WORTH_IT_S", 0.0)
    with caplog.at_level(logging.INFO, "capdist"):
        _encode(_Encoder(), "auto")
    cost, gain = caplog.messages
    assert cost.startswith("encoder compiled in ")
    assert "photos/s before" in gain


def test_encoding_goes_on_without_a_compiler(caplog: pytest.LogCaptureFixture) -> None:
    encoder = _Encoder("InvalidCxxCompiler: no working compiler")
    with caplog.at_level(logging.INFO, "capdist"):
        _encode(encoder, "on")
    assert encoder.compiled_at == [0]
    (message,) = caplog.messages
    assert "encoder.compile: not possible here" in message
    assert "no working compiler" in message
