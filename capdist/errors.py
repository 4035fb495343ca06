"""One exception class for each way a run can end that is not our bug, and the exit code of each.

Every message is one line that says what was found, where (file, line, key), and what would be right.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

EXIT_FOLDER_VARIABLE = "CAPDIST_EXIT_FOLDER"
"""Names the folder in which processes leave how they ended for the parent that `capdist train` is."""

_STORAGE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR,
    errno.EISDIR, errno.ENAMETOOLONG, errno.EIO,
}  # fmt: skip


class CapdistError(Exception):
    """Root of the errors that a user can cause and mend.

    Args:
        mistakes: One line for each thing that is wrong; all of them are printed.
    """

    exit_code = 1

    def __init__(self, *mistakes: str) -> None:
        super().__init__(*mistakes)
        self.mistakes = mistakes

    def __str__(self) -> str:
        return "\n".join(self.mistakes)


class UsageError(CapdistError):
    """A command line, recipe or launch that asks for something impossible."""

    exit_code = 2


class DataError(CapdistError):
    """Captions, photos or splits that cannot be used."""

    exit_code = 3


class CheckpointError(CapdistError):
    """A checkpoint or model folder that is damaged, foreign or does not fit."""

    exit_code = 4


class StorageError(CapdistError):
    """Input or output failed: disk full, permission, a download without a network."""

    exit_code = 5


class NumericsError(CapdistError):
    """A loss or gradient that is not a finite number."""

    exit_code = 6


class ProcessError(CapdistError):
    """A process of the run died or hung."""

    exit_code = 7


class Stopped(CapdistError):
    """A signal ended the run after what it had done was saved.

    Args:
        signal_number: The signal; the exit code is 128 plus it, as shells have it.
        mistake: The line to print.
    """

    def __init__(self, signal_number: int, mistake: str) -> None:
        super().__init__(mistake)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, str]]:
        return Stopped, (self.exit_code - 128, self.mistakes[0])


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known name most like `name`, else the list of all known names."""
    import difflib

    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else f"; known: {', '.join(known)}"


def run_program(program: Callable[[], object], *, debug: bool = False) -> int:
    """Run `program` and turn how it ends into an exit code, printing one line a mistake on standard error.

    Args:
        program: Called without arguments; its result is dropped.
        debug: Also print the traceback of an expected error.

    Returns:
        0 when it returned, the class's code for a `CapdistError`, 5 for a full disk or a missing permission,
        130 for Ctrl-C, 1 (with a traceback) for everything else, which is a bug of ours.
    """
    code = 0
    try:
        program()
    except (Exception, KeyboardInterrupt) as error:
        code, mistakes = _classify(error)
        if code == 1 or debug:
            traceback.print_exc()
        _tell(code, mistakes)
    return code


def _classify(error: BaseException) -> tuple[int, tuple[str, ...]]:
    if isinstance(error, CapdistError):
        return error.exit_code, error.mistakes
    if isinstance(error, KeyboardInterrupt):
        return 130, ("interrupted before there was anything to save",)
    number = error.errno if isinstance(error, OSError) else _foreign_errno(error)
    if number in _STORAGE_ERRORS:
        what = getattr(error, "filename", None) or "input/output"
        reason = os.strerror(number)
        return StorageError.exit_code, (f"{what}: {reason}; free space or fix path and permission, then repeat",)
    return 1, ()


def _foreign_errno(error: BaseException) -> int | None:
    """Return the errno that libraries written in Rust, such as safetensors, put into the text of their errors."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _tell(code: int, mistakes: tuple[str, ...]) -> None:
    """Print the mistakes, or leave them to the parent that prints those of all processes once."""
    folder = os.environ.get(EXIT_FOLDER_VARIABLE)
    if folder:
        end = json.dumps({"code": code, "mistakes": mistakes, "processes": int(os.environ.get("WORLD_SIZE", "1"))})
        with contextlib.suppress(OSError):
            Path(folder, f"rank_{os.environ.get('RANK', '0')}").write_text(end)
            return
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    for mistake in mistakes:
        print(f"capdist: error: {mistake}", file=sys.stderr)  # noqa: T201


def show_value(value: object) -> str:
    """Return a wrong value and its type as messages show them, cut if it is long."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
