"""Files: written whole or not at all, safe from a power cut, held by one process at a time."""

from __future__ import annotations

import fcntl
import os
import uuid
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
