"""Training still computes what it computed when `tests/golden/training_bits.json` was written, to the bit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.golden.make_training_goldens import HERE, RUNS, train_and_describe

pytestmark = pytest.mark.slow

RENAMED: dict[str, str] = {}
"""Tensors that have another name now: the old name, and the new one."""

GOLDEN: dict[str, Any] = json.loads((HERE / "training_bits.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_and_describe(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("run", [run for runs in RUNS.values() for run in runs])
@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_tensors_have_the_bits_they_had(trained: dict[str, Any], run: str, part: str) -> None:
    found = trained["runs"][run][part]
    expected = {RENAMED.get(name, name): values for name, values in GOLDEN["runs"][run][part].items()}
    assert found.keys() == expected.keys()
    norms = {name: norm for name, (_, norm) in found.items()}
    assert norms == pytest.approx({name: norm for name, (_, norm) in expected.items()}, rel=1e-3, abs=1e-6)
    if trained["torch"] != GOLDEN["torch"]:
        pytest.skip(f"the norms agree; the bits are those of torch {GOLDEN['torch']}, here is {trained['torch']}")
    assert {name: digest for name, (digest, _) in found.items()} == {n: digest for n, (digest, _) in expected.items()}


@pytest.mark.parametrize("run", [run for runs in RUNS.values() for run in runs])
def test_losses_scores_and_captions_are_what_they_were(trained: dict[str, Any], run: str) -> None:
    found, expected = trained["runs"][run], GOLDEN["runs"][run]
    tolerance = 1e-12 if trained["torch"] == GOLDEN["torch"] else 1e-3
    assert [line.keys() for line in found["lines"]] == [line.keys() for line in expected["lines"]]
    for now, before in zip(found["lines"], expected["lines"], strict=True):
        for key, value in before.items():
            assert now[key] == (value if isinstance(value, str) else pytest.approx(value, rel=tolerance, abs=1e-9))
    assert [text for text, _ in found["captions"]] == [text for text, _ in expected["captions"]]
    assert [p for _, p in found["captions"]] == pytest.approx([p for _, p in expected["captions"]], rel=tolerance)
