"""Measure the prose of Markdown files and of Python docstrings.

    python experiments/prose.py README.md docs capdist                         # a table
    python experiments/prose.py README.md docs capdist --over 25               # sentences of more than 25 words
    python experiments/prose.py capdist --parameters --avoid                   # empty descriptions, words to avoid
    python experiments/prose.py README.md docs --sentences 20 --seed 0         # random sentences for a reader

Code blocks, tables, headings, images, comments and link targets are no prose. A bold heading at the beginning of a
paragraph ("**Set-up.**") is none either. A code span is one word. In Python, prose is every string that documents
something, without its examples. Descriptions of parameters, results and errors have their own row, so that short ones
hide no long sentence.

A sentence ends with `.`, `?`, `!` or `…` before a capital letter, a digit or a code span. A paragraph or an item of a
list ends it, too. A semicolon or a colon does not.

`empty parameters` are those whose description has no verb, no unit, no shape and no value, see `prose_parameters`.
"""

from __future__ import annotations

import argparse
import ast
import math
import random
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prose_parameters import fault_of

AVOID = re.compile(
    r"\b(so many|whatever|stands|as it is|by itself|for ever|mend(?:s|ed|ing)?|reckon(?:s|ed|ing)?|heed(?:s|ed|ing)?|"
    r"besides|told of)\b",
    re.IGNORECASE,
)
"""Words that a plainer word can replace."""

ABBREVIATIONS = frozenset({"e.g.", "i.e.", "al.", "cf.", "vs.", "fig.", "eq.", "sec.", "no.", "approx.", "resp."})
"""A full stop in one of these ends no sentence."""

CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
SKIPPED_SPAN = re.compile(r"!\[[^\]]*\]\([^)]*\)|(?<=\])\([^)\s]*\)|<https?://[^>]*>|<!--.*?-->", re.DOTALL)
SENTENCE_END = re.compile(r"[.!?…][\"')\]*_]*(\s+)(?=[\"'(\[*_]*[A-Z0-9])")
RUN_IN_HEADING = re.compile(r"\*\*[^*]+[.:]\*\*(?=\s|$)")
LIST_MARKER = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+")
FENCE = re.compile(r"\s*(```|~~~)")
MARKDOWN_NO_PROSE = re.compile(r"\s*(?:\||#{1,6} |-{3,}\s*$|\[[^\]]+\]:)")
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Examples?):$")
ENTRY = re.compile(r"(\*{0,2}[\w.]+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?: (.*)")
FIRST_LETTER = re.compile(r"[^\W_]")


@dataclass(frozen=True)
class Block:
    """Prose without a break: a paragraph, an item of a list, or one description.

    Attributes:
        path: File that holds it.
        line: Line on which it starts, counted from 1.
        text: Its lines, joined by line feeds.
        is_description: Whether it describes a parameter, a result or an error.
        parameter: Name of the parameter that it describes, or None.
    """

    path: Path
    line: int
    text: str
    is_description: bool = False
    parameter: str | None = None


@dataclass(frozen=True)
class Sentence:
    """One sentence.

    Attributes:
        block: Paragraph or description that it belongs to.
        line: Line on which it starts, counted from 1.
        text: What a reader sees, on one line.
        words: Number of its words; a code span is one.
        commas: Number of its commas outside code.
    """

    block: Block
    line: int
    text: str
    words: int
    commas: int

    @property
    def place(self) -> str:
        """File and line, as editors understand them."""
        return f"{self.block.path}:{self.line}"


# From files to blocks.


def markdown_blocks(path: Path, text: str) -> Iterator[Block]:
    """Yield the paragraphs and items of lists of a Markdown file."""
    lines = list(enumerate(text.splitlines(), start=1))
    yield from _paragraphs(path, _without_fences(lines))


def python_blocks(path: Path, text: str) -> Iterator[Block]:
    """Yield the paragraphs and descriptions of every string that documents something in a Python file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from _docstring_blocks(path, _dedented(node.value.value, node.lineno, node.col_offset))


def blocks_of(path: Path) -> list[Block]:
    """Return the prose of a file in the order of its lines."""
    read = python_blocks if path.suffix == ".py" else markdown_blocks
    return sorted(read(path, path.read_text(encoding="utf-8")), key=lambda block: block.line)


Lines = Sequence[tuple[int, str]]
"""Lines with their numbers."""


def _without_fences(lines: Lines) -> list[tuple[int, str]]:
    """Return the lines with blank ones instead of code blocks, tables and headings."""
    kept, fence = [], None
    for number, line in lines:
        mark = FENCE.match(line)
        is_code = fence is not None or mark is not None
        if mark and fence in (None, mark[1]):
            fence = None if fence else mark[1]
        kept.append((number, "" if is_code or MARKDOWN_NO_PROSE.match(line) else line))
    return kept


def _paragraphs(path: Path, lines: Lines, *, is_description: bool = False) -> Iterator[Block]:
    """Yield what blank lines and list markers separate, without indented code blocks."""
    gathered: list[tuple[int, str]] = []
    for number, line in [*lines, (0, "")]:
        marker = LIST_MARKER.match(line)
        if gathered and (not line.strip() or marker):
            yield Block(path, gathered[0][0], "\n".join(text for _, text in gathered), is_description)
            gathered = []
        is_code = not gathered and not marker and line.startswith("    ")
        if line.strip() and not is_code:
            gathered.append((number, line[marker.end() :] if marker else line.strip().removeprefix("> ")))


def _dedented(docstring: str, first_line: int, margin: int) -> list[tuple[int, str]]:
    """Return the lines of a docstring without the indentation that its place in the code asks for."""
    first, *rest = docstring.expandtabs().splitlines() or [""]
    texts = [first.strip(), *(line[margin:].rstrip() if not line[:margin].strip() else line.strip() for line in rest)]
    return list(enumerate(texts, start=first_line))


def _docstring_blocks(path: Path, lines: Lines) -> Iterator[Block]:
    """Yield the prose of a docstring in Google style."""
    sections: list[tuple[str, list[tuple[int, str]]]] = [("", [])]
    for number, line in lines:
        header = SECTION.match(line)
        if header:
            sections.append((header[1], []))
            continue
        if sections[-1][0] and line and not line.startswith(" "):
            sections.append(("", []))
        sections[-1][1].append((number, line))
    for name, inside in sections:
        if name in ("Args", "Attributes", "Raises"):
            yield from _entries(path, [(n, line[4:]) for n, line in inside], named=name != "Raises")
        elif name in ("Returns", "Yields"):
            yield from _paragraphs(path, [(n, line[4:]) for n, line in inside], is_description=True)
        elif not name:
            yield from _paragraphs(path, _without_fences(inside))


def _entries(path: Path, lines: Lines, *, named: bool) -> Iterator[Block]:
    """Yield the descriptions of a section of entries `name: text`, whose further lines are indented."""
    found: list[tuple[int, str, list[str]]] = []
    for number, line in lines:
        entry = ENTRY.match(line)
        if entry:
            found.append((number, entry[1], [entry[2]]))
        elif found and line.strip():
            found[-1][2].append(line.strip())
    for number, name, texts in found:
        yield Block(path, number, "\n".join(texts), is_description=True, parameter=name if named else None)


# From blocks to sentences.


def masked(text: str) -> str:
    """Return text of the same length in which a code span is one capitalised word and a link target is blank."""
    text = CODE_SPAN.sub(lambda span: "C" + "x" * (len(span[0]) - 1), text)
    return SKIPPED_SPAN.sub(lambda span: re.sub(r"\S", " ", span[0]), text)


def count_words(text: str) -> int:
    """Return how many tokens between spaces have a letter or a digit."""
    return sum(FIRST_LETTER.search(token) is not None for token in text.split())


def sentences_of(block: Block) -> Iterator[Sentence]:
    """Yield the sentences of a block."""
    shown = masked(block.text)
    heading = RUN_IN_HEADING.match(shown)
    starts, ends = [heading.end() if heading else 0], []
    for end in SENTENCE_END.finditer(shown, starts[0]):
        if shown[: end.start() + 1].split()[-1].lower().lstrip("(") not in ABBREVIATIONS:
            ends.append(end.start(1))
            starts.append(end.end())
    for start, stop in zip(starts, [*ends, len(shown)], strict=True):
        words = count_words(shown[start:stop])
        if words:
            begin = start + len(block.text[start:]) - len(block.text[start:].lstrip())
            line = block.line + block.text.count("\n", 0, begin)
            text = " ".join(block.text[start:stop].split())
            yield Sentence(block, line, text, words, shown.count(",", start, stop))


# What is printed.


@dataclass(frozen=True)
class Figures:
    """One row of the table.

    Attributes:
        name: What the first column shows: a file or folder, and the kind of prose.
        sentences: Sentences that the row is about.
        avoided: Number of words to avoid.
        faults: Number of empty descriptions of parameters, or None where there are no parameters.
    """

    name: str
    sentences: Sequence[Sentence]
    avoided: int
    faults: int | None = None

    def cells(self) -> list[str]:
        """Return the cells of the row; a row without sentences has dashes."""
        faults = "" if self.faults is None else str(self.faults)
        if not self.sentences:
            return [self.name, "0", *"-----", str(self.avoided), faults]
        words = [sentence.words for sentence in self.sentences]
        total = len(words)
        over = [f"{sum(count > limit for count in words) / total:.0%}" for limit in (25, 30, 40)]
        commas = sum(sentence.commas for sentence in self.sentences) / total
        middle, high = f"{statistics.median(words):g}", str(percentile(words, 90))
        return [self.name, str(total), f"{middle} / {high}", *over, f"{commas:.2f}", str(self.avoided), faults]


HEADER = ("prose", "sentences", "words, median / p90", "> 25", "> 30", "> 40", "commas", "to avoid", "empty parameters")


def percentile(values: Sequence[int], percent: int) -> int:
    """Return the smallest value that at least `percent` % of the values do not exceed (nearest rank)."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def figures(name: str, blocks: Sequence[Block]) -> Iterator[Figures]:
    """Yield a row for paragraphs and, if there are any, one for descriptions."""
    texts = [block for block in blocks if not block.is_description]
    described = [block for block in blocks if block.is_description]
    if texts or not described:
        yield Figures(name, _sentences(texts), len(list(avoided_in(texts))))
    if described:
        faults = len(list(faults_in(described)))
        yield Figures(f"{name}, descriptions", _sentences(described), len(list(avoided_in(described))), faults)


def avoided_in(blocks: Iterable[Block]) -> Iterator[tuple[str, str]]:
    """Yield place and text of each word to avoid."""
    for block in blocks:
        for match in AVOID.finditer(re.sub(r"\s", " ", masked(block.text))):
            yield f"{block.path}:{block.line + block.text.count(chr(10), 0, match.start())}", match[0]


def faults_in(blocks: Iterable[Block]) -> Iterator[tuple[Block, str]]:
    """Yield the empty descriptions of parameters, and what is wrong with each."""
    for block in blocks:
        fault = fault_of(block.parameter, block.text) if block.parameter else None
        if fault:
            yield block, fault


def _sentences(blocks: Iterable[Block]) -> list[Sentence]:
    return [sentence for block in blocks for sentence in sentences_of(block)]


def prose_files(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the files of each row: a Markdown file has its own, the Python files below a path share one.

    Raises:
        FileNotFoundError: if a path does not exist.
    """
    rows: dict[str, list[Path]] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in found:
            is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.suffix in (".md", ".py") and not is_hidden:
                rows.setdefault(str(file if file.suffix == ".md" else path), []).append(file)
    return rows


def print_table(rows: Iterable[Figures]) -> None:
    """Print rows as a Markdown table with columns of equal width."""
    cells = [list(HEADER), *(row.cells() for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def print_lists(blocks: Sequence[Block], arguments: argparse.Namespace) -> None:
    """Print what was asked for: long sentences, empty descriptions, words to avoid, random sentences."""
    found = _sentences(blocks)
    if arguments.over is not None:
        for sentence in sorted(found, key=lambda sentence: -sentence.words):
            if sentence.words > arguments.over:
                print(f"{sentence.place}: {sentence.words} words: {sentence.text}")
    if arguments.parameters:
        for block, fault in faults_in(blocks):
            print(f"{block.path}:{block.line}: {block.parameter}: {' '.join(block.text.split())} ({fault})")
    if arguments.avoid:
        for place, text in avoided_in(blocks):
            print(f"{place}: {text}")
    if arguments.sentences:
        chosen = random.Random(arguments.seed).sample(found, min(arguments.sentences, len(found)))
        for sentence in chosen:
            print(f"{sentence.place}: {sentence.text}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="Markdown files, Python files, or folders of both")
    parser.add_argument("--over", type=int, metavar="WORDS", help="list longer sentences, the longest first")
    parser.add_argument("--parameters", action="store_true", help="list parameters whose description is empty")
    parser.add_argument("--avoid", action="store_true", help="list words to avoid")
    parser.add_argument("--sentences", type=int, metavar="N", help="print N random sentences")
    parser.add_argument("--seed", type=int, default=0, help="decides the random sentences (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or the lists that were asked for; return the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        rows = prose_files(arguments.paths)
    except FileNotFoundError as error:
        print(f"prose.py: error: {error}", file=sys.stderr)
        return 2
    blocks = {name: [block for file in files for block in blocks_of(file)] for name, files in rows.items()}
    if arguments.over is arguments.sentences is None and not arguments.parameters and not arguments.avoid:
        print_table(row for name, inside in blocks.items() for row in figures(name, inside))
    else:
        print_lists([block for inside in blocks.values() for block in inside], arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
