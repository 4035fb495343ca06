"""Files: written whole or not at all, safe from a power cut, held by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a file that others may read, or write, at the same time: they find the old text or the new one."""
    staging = path.with_name(f".tmp_{path.name}_{uuid.uuid4().hex[:8]}")
    try:
        staging.write_text(text, encoding="utf-8")
        flush_to_disk(staging)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def staged_folder(folder: Path, staging: Path) -> Iterator[Path]:
    """Fill a folder under another name, and give it its own once it is on the disk: it appears whole or not at all.

    A folder that has the name already is kept as `set_aside(folder)` until the new one has taken its place, and put
    back if that fails.

    Args:
        folder: What is to appear; of files only.
        staging: Where it is filled, beside `folder`; what a killed process left there is removed.

    Raises:
        OSError: if the disk fails; then, as after any error within the context, `staging` is gone.
    """
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in (*staging.iterdir(), staging):
            flush_to_disk(path)
        _put_in_place(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def set_aside(folder: Path) -> Path:
    """Return the name of a folder while `staged_folder` replaces it; if it is killed just then, the old one has it."""
    return folder.with_name(f".old_{folder.name}")


def _put_in_place(staging: Path, folder: Path) -> None:
    old = set_aside(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    try:
        os.replace(staging, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    flush_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def try_lock(path: Path) -> TextIO | None:
    """Take the lock that a file stands for, without waiting.

    Returns:
        The open file, whose closing frees the lock, as does the end of the process, however it ends; None if another
        process holds it.
    """
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
