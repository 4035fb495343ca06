"""Collects what a source finds while it reads: mistakes, which end the run, and oddities, which become notes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from capdist.errors import DataError

MISTAKES_SHOWN = 10
ODDITIES_SHOWN = 3


class Oddity(NamedTuple):
    """The text of a kind of oddity, for one and for many; examples follow it."""

    one: str
    many: str


MISSING_PHOTO = Oddity(
    "photo named in the caption file does not exist", "photos named in the caption file do not exist"
)
NO_CAPTION = Oddity("photo has no caption and was left out", "photos have no caption and were left out")
NO_SPLIT = Oddity("photo is in no split and was left out", "photos are in no split and were left out")
UNKNOWN_SPLIT = Oddity(
    "image is in none of train, validation and test and was left out",
    "images are in none of train, validation and test and were left out",
)
BLANK_CAPTION = Oddity("empty caption was left out", "empty captions were left out")


@dataclass(frozen=True)
class Note:
    """Something odd about the data; `str` gives its line.

    Attributes:
        kind: The kind of oddity, or a remark that is printed unchanged.
        examples: Every photo or place that showed it.
    """

    kind: Oddity | str
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        if isinstance(self.kind, str):
            return self.kind
        words = self.kind.one if len(self.examples) == 1 else self.kind.many
        more = ", …" if len(self.examples) > ODDITIES_SHOWN else ""
        return f"{len(self.examples):,} {words}: {', '.join(self.examples[:ODDITIES_SHOWN])}{more}"


class Findings:
    """Collects mistakes and oddities by kind. A user sees all kinds at once, each with a few examples."""

    def __init__(self) -> None:
        self._mistakes: defaultdict[str, list[str]] = defaultdict(list)
        self._oddities: defaultdict[Oddity, list[str]] = defaultdict(list)
        self._remarks: list[str] = []

    def mistake(self, kind: str, where: str) -> None:
        """Record a mistake: `kind` says what is wrong and what would be right, `where` is file and line or key."""
        self._mistakes[kind].append(where)

    def oddity(self, kind: Oddity, example: str) -> None:
        """Record something that was left out; `example` is the photo or the place."""
        self._oddities[kind].append(example)

    def remark(self, note: str) -> None:
        """Record a note that is printed unchanged."""
        self._remarks.append(note)

    def raise_mistakes(self) -> None:
        """Raise one `DataError` with the first ten mistakes of each kind and their total, if there are any."""
        lines: list[str] = []
        for kind, places in self._mistakes.items():
            lines += [f"{place}: {kind}" for place in places[:MISTAKES_SHOWN]]
            if len(places) > MISTAKES_SHOWN:
                lines.append(f"{len(places):,} such places in all: {kind}")
        if lines:
            raise DataError(*lines)

    def notes(self) -> tuple[Note, ...]:
        """Return the oddities, then the remarks."""
        oddities = (Note(kind, tuple(examples)) for kind, examples in self._oddities.items())
        return (*oddities, *map(Note, self._remarks))
