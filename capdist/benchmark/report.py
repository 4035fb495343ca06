"""Results of benchmarks, as a table for people and as JSON for programs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from capdist.benchmark.measure import Timing

CEILING = "matrix product"
BASELINE = "textbook"


@dataclass(frozen=True)
class Row:
    """One contestant.

    Attributes:
        name: `textbook`, `capdist`, `matrix product` (the ceiling), or another.
        runs: Seconds of each timed call.
        seconds: How long the whole takes: the median call times the number of calls.
        units: How many captions or photos the whole is worth, over all processes.
        flops: Number of operations of one call in one process; None if they were not counted.
        num_processes: How many processes took part.
        note: What a reader of the row should also know.
    """

    name: str
    runs: tuple[float, ...]
    seconds: float
    units: float | None
    flops: float | None
    num_processes: int = 1
    note: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        timing: Timing,
        units: float | None,
        num_processes: int = 1,
        *,
        calls: float = 1,
        note: str = "",
    ) -> Row:
        """Make a row of what was timed."""
        return cls(name, timing.seconds, timing.median * calls, units, timing.flops or None, num_processes, note)

    @property
    def per_second(self) -> float | None:
        """Units a second."""
        return None if self.units is None else self.units / self.seconds

    @property
    def gflops(self) -> float | None:
        """Billions of operations a second of all processes, by the median call."""
        if self.flops is None:
            return None
        return self.flops * self.num_processes / statistics.median(self.runs) / 1e9


@dataclass(frozen=True)
class Table:
    """One benchmark.

    Attributes:
        name: What the benchmark measures; the title of the printed table.
        unit: What `units` counts.
        rows: One for each contestant, in the order in which they are printed.
        shares: Share of time by kind of work, if it was profiled.
        facts: What else was found, by name.
    """

    name: str
    unit: str
    rows: Sequence[Row]
    shares: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "benchmark": self.name,
            "unit": self.unit,
            "rows": [
                {
                    "name": row.name,
                    "seconds": row.seconds,
                    "runs": list(row.runs),
                    "units": row.units,
                    "per_second": row.per_second,
                    "gflops": row.gflops,
                    "of_ceiling": self.of_ceiling(row),
                    "times_textbook": self.times_textbook(row),
                    "num_processes": row.num_processes,
                    "note": row.note,
                }
                for row in self.rows
            ],
            "shares": dict(self.shares),
            **self.facts,
        }

    def of_ceiling(self, row: Row) -> float | None:
        """Return the row's operations a second as a share of the matrix product's."""
        ceiling = next((other.gflops for other in self.rows if other.name == CEILING), None)
        return None if ceiling is None or row.gflops is None else row.gflops / ceiling

    def times_textbook(self, row: Row) -> float | None:
        """Return how many times as fast as the textbook the row is."""
        plain = next((other.per_second for other in self.rows if other.name == BASELINE), None)
        return None if plain is None or row.per_second is None else row.per_second / plain

    def show(self, console: Console) -> None:
        """Print it."""
        table = RichTable(title=self.name, title_justify="left")
        for column in ("", "seconds", f"{self.unit}/s", "x textbook", "GFLOP/s", "of ceiling"):
            table.add_column(column, justify="left" if not column else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.name,
                f"{row.seconds:.3g}" if row.seconds < 1000 else f"{row.seconds:,.0f}",
                _show(row.per_second, ",.1f"),
                _show(self.times_textbook(row), ".1f"),
                _show(row.gflops, ",.1f"),
                _show(self.of_ceiling(row), ".0%"),
            )
        console.print(table)
        for row in self.rows:
            if row.note:
                console.print(f"  {row.name}: {row.note}")
        for kind, share in self.shares.items():
            console.print(f"  {share:6.1%}  {kind}")
        for name, value in self.facts.items():
            console.print(f"  {name}: {value}")


def _show(value: float | None, pattern: str) -> str:
    return "" if value is None else format(value, pattern)
