"""Digests of photos, remembered in a file: a photo is read again only if its file seems to have changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from capdist.errors import DataError
from capdist.files import write_atomically

Remembered = dict[str, tuple[int, int, int, str]]
"""Maps absolute paths to the size in bytes, the times in ns when contents and entry last changed, and the digest."""

_FILE = TypeAdapter(Remembered, config=ConfigDict(strict=True))
_SETTLED_NS = 2_000_000_000


def digest_photos(photos: Iterable[Mapping[str, Any]], memory: Path) -> list[str]:
    """Return the BLAKE2 digest of each photo's bytes, 32 hexadecimal digits.

    Args:
        photos: Rows with `path` and/or `bytes`, as a `datasets.Image(decode=False)` column gives them.
        memory: JSON file of known digests. It is used for photos whose size and times of change have not changed, and
            then updated. A damaged one is replaced. Photos that come as bytes are always digested.

    Raises:
        DataError: naming the photo that cannot be read; the digests before it are remembered.
    """
    known, fresh = _read(memory), Remembered()
    try:
        return [_digest(photo, known, fresh) for photo in photos]
    finally:
        if fresh:
            memory.parent.mkdir(parents=True, exist_ok=True)
            # Read again, because another run may have added digests.
            write_atomically(memory, json.dumps(_read(memory) | fresh))


def _digest(photo: Mapping[str, Any], known: Remembered, fresh: Remembered) -> str:
    if photo["bytes"] is not None:
        return _digest_bytes(photo["bytes"])
    path = os.path.abspath(photo["path"])
    try:
        status = os.stat(path)
        # A copy can keep the time of the contents, and another photo can have the same size. Nothing keeps the entry's
        # time.
        state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if path in known and known[path][:3] == state:
            return known[path][3]
        now_ns = time.time_ns()
        digest = _digest_bytes(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{photo['path']}: {error.strerror}") from None
    # A file that has just changed may change again within the same time stamp: clocks of file systems are coarse.
    if now_ns - status.st_mtime_ns > _SETTLED_NS:
        fresh[path] = (*state, digest)
    return digest


def _digest_bytes(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _read(memory: Path) -> Remembered:
    try:
        return _FILE.validate_json(memory.read_bytes())
    except (OSError, ValueError):
        return {}
