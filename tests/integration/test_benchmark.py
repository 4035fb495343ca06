"""`capdist benchmark` as a user runs it, on sizes that a test can afford: what it measures, not how fast that is."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from capdist.benchmark.measure import count_flops, shares_of_time, time_in_turns
from capdist.benchmark.report import Row, Table
from capdist.benchmark.workload import FLICKR8K_LENGTHS, made_up_captions

SIZES = (
    "data.image_size=64", "data.batch_size=4", "encoder.name=resnet18", "encoder.compile=off", "decoder.embed_size=16",
    "decoder.hidden_size=16", "decoder.attention_size=16", "encoder.batch_size=8",
    "evaluation.batch_size=8", "run.threads=1",
)  # fmt: skip
CPU = torch.device("cpu")


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "capdist.cli", "benchmark", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("benchmark")
    profile, output = folder / "traces", folder / "out.json"
    done = run_benchmark(
        "--repeats", "2", "--images", "16", "--json", str(output), "--profile", str(profile), *SIZES
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (profile / "train-step.json").stat().st_size > 10_000
    found = json.loads(output.read_text())
    assert found["machine"]["threads"] == 1
    for table in found["benchmarks"]:
        assert table["benchmark"] in done.stdout
    return {table["benchmark"]: table for table in found["benchmarks"]}


@pytest.mark.slow
def test_every_benchmark_reports_each_contestant(tables: dict[str, dict[str, Any]]) -> None:
    rows = {name: [row["name"] for row in table["rows"]] for name, table in tables.items()}
    assert rows == {
        "train-step": ["matrix product", "textbook", "capdist"],
        "encode": ["matrix product", "textbook", "capdist, plain", "capdist, compiled", "network alone"],
        "caption, beam 3": ["matrix product", "textbook", "capdist"],
        "input": ["textbook", "capdist"],
        "epoch": ["textbook", "capdist"],
    }
    for table in tables.values():
        for row in table["rows"]:
            assert row["seconds"] > 0
            if row["units"] is not None:
                assert row["per_second"] == pytest.approx(row["units"] / row["seconds"])
    units = {name: {row["name"]: row["units"] for row in table["rows"]} for name, table in tables.items()}
    assert units["train-step"]["textbook"] == 32
    assert units["train-step"]["capdist"] == 4 * 5
    assert units["epoch"] == {"textbook": 80, "capdist": 80}
    assert units["caption, beam 3"]["capdist"] == 16
    assert sum(tables["train-step"]["shares"].values()) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_search_of_the_benchmark_writes_the_textbooks_captions(tables: dict[str, dict[str, Any]]) -> None:
    caption = tables["caption, beam 3"]
    assert caption["same captions as the textbook"] == "1 of 1"
    assert caption["largest difference of log-probability"] < 1e-3


@pytest.mark.slow
def test_an_unknown_name_is_one_line_and_code_2() -> None:
    done = run_benchmark("train-stop")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("capdist: error: benchmark: 'train-stop'")
    assert "train-step" in done.stderr
    assert "Traceback" not in done.stderr


def test_operations_are_counted_as_the_formula_says() -> None:
    layer = nn.Linear(7, 5)
    inputs = torch.randn(3, 7, requires_grad=True)
    assert count_flops(lambda: layer(inputs)) == 2 * 3 * 7 * 5
    assert count_flops(lambda: layer(inputs).sum().backward()) == 3 * 2 * 3 * 7 * 5


def test_functions_take_turns() -> None:
    order: list[str] = []
    timings = time_in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, device=CPU)
    assert order == ["a", "b", *["a", "b"] * 3]
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]


def test_shares_of_time_name_the_kind_of_work() -> None:
    matrix = torch.randn(600, 600)
    shares = shares_of_time(lambda: [matrix @ matrix for _ in range(10)], CPU)
    assert next(iter(shares)) == "matrix products"
    assert shares["matrix products"] > 0.5


def test_ratios_are_those_of_the_rates() -> None:
    rows = [
        Row("matrix product", (1.0, 2.0, 9.0), 2.0, None, 8_000_000_000),
        Row("textbook", (4.0,), 4.0, 8.0, 4_000_000_000),
        Row("capdist", (0.5,), 0.5, 20.0, 1_000_000_000, num_processes=2),
    ]
    table = Table("t", "captions", rows)
    assert [table.times_textbook(row) for row in rows] == [None, 1.0, 20.0]
    assert [table.of_ceiling(row) for row in rows] == [1.0, 0.25, 1.0]


def test_made_up_captions_are_as_long_as_those_of_flickr8k() -> None:
    assert sum(FLICKR8K_LENGTHS.values()) == 30_000
    table = made_up_captions(4000, max_length=20)
    labels = [len(c) for image in range(4000) for c in table.captions(image)]
    assert len(labels) == 20_000
    expected = sum(min(n + 1, 21) * count for n, count in FLICKR8K_LENGTHS.items()) / 30_000
    cut = sum(count for n, count in FLICKR8K_LENGTHS.items() if n > 20) / 30_000
    assert sum(labels) / len(labels) == pytest.approx(expected - cut, rel=0.01)
    assert table.num_cut / 20_000 == pytest.approx(cut, abs=0.005)
    assert max(labels) == 21
    assert (table.ids[table.caption_starts[1:] - 1] == 2).sum() == 20_000 - table.num_cut
