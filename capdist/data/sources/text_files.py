"""Caption files: strictly UTF-8, read line by line so that every error names file and line."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from capdist.data.sources.findings import BLANK_CAPTION, Findings
from capdist.errors import DataError

# Tab, line feed, vertical tab, form feed and carriage return count as spaces; lone surrogates come from JSON.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file without byte order mark.

    Raises:
        DataError: It is no regular file, or not UTF-8 (names the line).
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise DataError(
            f"{path}:{line}: byte 0x{byte:02x} at offset {error.start} is not UTF-8; save the file as UTF-8"
        ) from None


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield `("file:line", text)` for each line that is not blank."""
    # Not splitlines(): it also splits at characters such as U+2028 that a caption may contain.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.rstrip("\r")


def read_csv(path: Path, findings: Findings) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield `("file:line", {column: text})` for each row of a CSV file with a header.

    Each line is parsed alone: a forgotten quote then spoils one line and cannot swallow the lines after it.

    Raises:
        DataError: as `read_text`, or two columns have the same name.
    """
    lines = read_lines(path)
    header: list[str] = []
    for place, line in lines:
        fields = _csv_fields(line)
        if fields is None:
            findings.mistake("the quotes do not match; write a quote inside a quoted field twice", place)
        elif not header:
            header = [name.strip() for name in fields]
            _refuse_repeated(header, place)
        elif len(fields) != len(header):
            findings.mistake(
                f"the number of fields is not the {len(header)} of the header; quote captions that hold commas",
                f"{place}: {len(fields)} fields",
            )
        else:
            yield place, dict(zip(header, fields, strict=True))


def _refuse_repeated(header: list[str], place: str) -> None:
    # Spreadsheets leave nameless columns behind, which nobody reads.
    repeated = next((name for name in header if name and header.count(name) > 1), None)
    if repeated is not None:
        raise DataError(
            f"{place}: {header.count(repeated)} columns are called '{repeated}', of which one would be read; name each "
            "by itself, captions caption_1, caption_2 and so on"
        )


def _csv_fields(line: str) -> list[str] | None:
    if len(line) > csv.field_size_limit():
        csv.field_size_limit(len(line))
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error:
        return None


def clean_caption(caption: str, place: str, findings: Findings) -> str | None:
    """Return a caption in Unicode NFC on one line with single spaces.

    Return None and record a finding if it is blank (an oddity) or has control characters (a mistake).
    """
    if _CONTROL.search(caption):
        findings.mistake("the caption has a control character; remove it", place)
        return None
    words = unicodedata.normalize("NFC", caption).split()
    if not words:
        findings.oddity(BLANK_CAPTION, place)
        return None
    return " ".join(words)
