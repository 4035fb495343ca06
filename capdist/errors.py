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
from dataclasses import dataclass, replace
from pathlib import Path

EXIT_FOLDER_VARIABLE = "CAPDIST_EXIT_FOLDER"
"""Names the folder in which processes leave how they ended for the parent that `capdist train` is."""

_STORAGE_REMEDIES = {
    errno.EMFILE: "raise the limit (`ulimit -n`) or lower data.num_workers",
    errno.ENFILE: "close other programs or lower data.num_workers",
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT), "check the disk or the network that it is on"),
    **dict.fromkeys(
        (
            errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST,
            errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
        ),
        "free space or fix path and permission",
    ),
}  # fmt: skip

# What torch says in a plain RuntimeError when a processor's or a GPU's memory is full.
_NO_MEMORY_TEXTS = ("you tried to allocate", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

# What gloo says in a plain RuntimeError when another process is gone or hangs; NCCL and the store have classes for it.
_LOST_PEER_TEXTS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed",
    "Application timeout caused pair closure", "Timed out waiting", "connectFullMesh failed",
)  # fmt: skip


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong. It stays data until it is printed: `str` gives its line.

    Attributes:
        key: Recipe key that it is about, such as `data.path`; empty for none.
        text: What was found.
        hint: What would be right.
        place: File and line, `command line`, or the name of a run.
    """

    key: str
    text: str
    hint: str = ""
    place: str = ""

    def __str__(self) -> str:
        line = ": ".join(part for part in (self.place, self.key, self.text) if part)
        return f"{line}; {self.hint}" if self.hint else line

    def at(self, place: str) -> Mistake:
        """Return the mistake with `place` written before the place that it has."""
        return replace(self, place=f"{place}: {self.place}" if self.place else place)


class CapdistError(Exception):
    """Root of the errors that a user can cause and correct.

    Args:
        mistakes: Everything that is wrong; each is printed as one line. A text is a mistake about no key.

    Attributes:
        mistakes: The same, all of them as `Mistake`.
    """

    exit_code = 1

    def __init__(self, *mistakes: Mistake | str) -> None:
        self.mistakes = tuple(m if isinstance(m, Mistake) else Mistake("", m) for m in mistakes)
        super().__init__(*self.mistakes)

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """The mistakes as they are printed, one line each."""
        return tuple(map(str, self.mistakes))


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
    """A process of the run died or hung, or its memory ran out."""

    exit_code = 7


class Stopped(CapdistError):
    """A signal ended the run; the line says what is saved.

    Args:
        signal_number: The signal; the exit code is 128 plus it, as shells have it.
        mistake: The line to print.
    """

    def __init__(self, signal_number: int, mistake: Mistake | str) -> None:
        super().__init__(mistake)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type[Stopped], tuple[int, Mistake]]:
        return Stopped, (self.exit_code - 128, self.mistakes[0])


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like `name`, or None if none is like it."""
    import difflib

    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known name most like `name`, else the list of all known names."""
    known = sorted(known)
    closest = nearest_name(name, known)
    return f"; known: {', '.join(known)}" if closest is None else f"; did you mean '{closest}'?"


def run_program(program: Callable[[], object], *, debug: bool = False) -> int:
    """Run `program` and turn how it ends into an exit code, printing one line a mistake on standard error.

    Args:
        program: Called without arguments; its result is dropped.
        debug: Also print the traceback of an expected error.

    Returns:
        0 when it returned, the class's code for a `CapdistError`, 5 for a full disk or a missing permission,
        7 when memory ran out, 130 for Ctrl-C, 1 (with a traceback) for everything else, which is a bug of ours.
    """
    code = 0
    try:
        program()
    except (Exception, KeyboardInterrupt) as error:
        code, lines = _classify(error)
        if code == 1 or debug:
            traceback.print_exc()
        _tell(code, lines, lost_peers=_lost_peers(error))
    return code


def _classify(error: BaseException) -> tuple[int, tuple[str, ...]]:
    """Return the exit code and the lines to print."""
    if isinstance(error, CapdistError):
        return error.exit_code, error.lines
    if isinstance(error, KeyboardInterrupt):
        return 130, ("interrupted; a training run goes on from its last checkpoint, if it has one, with --resume",)
    number = error.errno if isinstance(error, OSError) else _foreign_errno(error)
    if number == errno.ENOMEM or _ran_out_of_memory(error):
        return ProcessError.exit_code, (_show_lack_of_memory(error),)
    if number in _STORAGE_REMEDIES:
        what = getattr(error, "filename", None) or "input/output"
        return StorageError.exit_code, (f"{what}: {os.strerror(number)}; {_STORAGE_REMEDIES[number]}, then repeat",)
    return 1, ()


def _ran_out_of_memory(error: BaseException) -> bool:
    # By name, because this layer does without torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY_TEXTS)


def _show_lack_of_memory(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "no more was said")
    return (
        f"memory ran out: {first}; lower evaluation.batch_size (`capdist evaluate`: --batch-size), encoder.batch_size, "
        "data.num_workers or, in a new run, data.batch_size; where the encoder trains, "
        "encoder.gradient_checkpointing=true needs less"
    )


def _lost_peers(error: BaseException) -> bool:
    """Return whether a process failed only because others of its run are gone, which know the reason."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return type(error) is RuntimeError and any(text in str(error) for text in _LOST_PEER_TEXTS)


def _foreign_errno(error: BaseException) -> int | None:
    """Return the errno that libraries written in Rust, such as safetensors, put into the text of their errors."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _tell(code: int, lines: tuple[str, ...], *, lost_peers: bool) -> None:
    """Print the lines, or leave them to the parent that prints those of all processes once."""
    folder = os.environ.get(EXIT_FOLDER_VARIABLE)
    if folder:
        # Of this machine, whose parent will look for what they leave.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
        end = {"code": code, "mistakes": lines, "lost_peers": lost_peers, "processes": processes}
        with contextlib.suppress(OSError):
            Path(folder, f"rank_{os.environ.get('RANK', '0')}").write_text(json.dumps(end))
            return
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    for line in lines:
        print(f"capdist: error: {line}", file=sys.stderr)  # noqa: T201


def show_value(value: object) -> str:
    """Return a wrong value and its type as messages show them, cut if it is long."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def reason_of(error: Exception) -> str:
    """Return in one line what a library says, or the error's class; no longer than fits into a message.

    Not its first line: that of `load_state_dict` only says that there are errors.
    """
    return (" ".join(str(error).split())[:200] or type(error).__name__).rstrip(".")
