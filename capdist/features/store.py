"""The feature store: the features of a split from a frozen encoder, kept on disk and mapped into memory.

A store is a folder with `features.npy`, `done.npy`, `about.json` for people, and `.lock`, which the run that fills it
holds. `done.npy` has a 1 for each row whose features are safely in the file.

Shapes: I rows, one an image (or one a view of an image, see `Views`), N cells, C channels.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capdist.files import staged_folder, try_lock

VERSION = 2
FEATURES, DONE, ABOUT, LOCK = "features.npy", "done.npy", "about.json", ".lock"
FLUSH_EVERY_S = 2.0
"""Seconds of encoding that a power cut may cost."""
_ROWS_HELD_AT_ONCE = 256


class FeatureStore:
    """Features (I, N, C) in float16, mapped into memory: processes share one copy, and the system may evict it.

    Args:
        array: Array (I, N, C), as `numpy.load(..., mmap_mode="r")` gives it.
    """

    def __init__(self, array: NDArray[np.float16]) -> None:
        self.array = array
        self._device = torch.device("cpu")
        self._held: Tensor | None = None

    def __len__(self) -> int:
        return len(self.array)

    def features(self, rows: Tensor) -> Tensor:
        """Return float32 features (B, N, C) of rows (B,), on the CUDA device of `hold`, or else on the CPU.

        Rows are on the CPU. The features are a copy.
        """
        if self._held is not None:
            return self._held[rows.to(self._device, non_blocking=True)].float()
        if self._device.type == "cuda":
            return self._pinned(rows).to(self._device, non_blocking=True).float()
        return torch.from_numpy(self.array[rows.numpy()]).float()

    def hold(self, device: torch.device) -> bool:
        """Give features on a device from now on, and keep all of them in its memory if they fit.

        Only CUDA devices hold features; any other device changes nothing.

        Returns:
            Whether the device holds them.
        """
        if device.type == "cuda":
            self._device = device
            torch.cuda.empty_cache()
            if fits(self.array.nbytes, torch.cuda.mem_get_info(device)[0]):
                self._held = torch.empty(self.array.shape, dtype=torch.float16, device=device)
                for start in range(0, len(self), _ROWS_HELD_AT_ONCE):
                    rows = slice(start, start + _ROWS_HELD_AT_ONCE)
                    self._held[rows].copy_(torch.from_numpy(np.array(self.array[rows])))
        return self._held is not None

    def _pinned(self, rows: Tensor) -> Tensor:
        buffer = torch.empty((len(rows), *self.array.shape[1:]), dtype=torch.float16, pin_memory=True)
        # "clip", because the default mode makes another copy before it fills `out`.
        np.take(self.array, rows.numpy(), axis=0, out=buffer.numpy(), mode="clip")
        return buffer

    @classmethod
    def open(cls, folder: Path) -> FeatureStore:
        """Map a store of which every row is done."""
        return cls(np.lib.format.open_memmap(folder / FEATURES, mode="r"))


def fits(num_bytes: int, free_bytes: int) -> bool:
    """Return whether features fit into half of a device's free memory; the other half is for training."""
    return num_bytes < free_bytes / 2


class StoreWriter:
    """Fills rows of a store. A row is marked done only once its features are safely in the file.

    Several processes may each fill their own rows. Leaving the context flushes, even after an error.

    Args:
        folder: Folder that holds the store; this run must hold its lock.
    """

    def __init__(self, folder: Path) -> None:
        self._features, self._done = _RowFile(folder / FEATURES), _RowFile(folder / DONE)
        self._unmarked: list[NDArray[np.int64]] = []
        self._flushed_s = time.monotonic()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.flush()
        finally:
            self._features.close()
            self._done.close()

    def put(self, rows: Tensor, features: Tensor) -> None:
        """Write features (B, N, C) of rows (B,), and `flush` from time to time.

        Raises:
            OSError: if the disk fails.
        """
        self._features.write(rows.numpy(), features.to(torch.float16).cpu().numpy())
        self._unmarked.append(rows.numpy())
        # Waiting for the disk after each batch would cost more than encoding a few batches again.
        if time.monotonic() - self._flushed_s >= FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Wait until all rows that were put are on the disk, and mark them done.

        Raises:
            OSError: if the disk fails.
        """
        rows, self._unmarked = self._unmarked, []  # if this fails, they never are: a system reports a loss once
        if rows:
            self._features.flush()
            marked = np.concatenate(rows)
            self._done.write(marked, np.ones(len(marked), np.uint8))
            self._done.flush()
        self._flushed_s = time.monotonic()


class _RowFile:
    """Writes rows of a `.npy` file at their places.

    It does not use a memory map, for two reasons. A machine writes whole pages of a map back; on a shared disk these
    may hold outdated copies of rows that another machine wrote. And if a disk fails, a map kills the process instead of
    raising an error.
    """

    def __init__(self, path: Path) -> None:
        array = np.lib.format.open_memmap(path, mode="r")
        self._start, self._row_bytes = array.offset, array.strides[0]
        self._file = path.open("r+b", buffering=0)

    def write(self, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        for row, value in zip(rows.tolist(), np.ascontiguousarray(values), strict=True):
            waiting, offset = value.tobytes(), self._start + row * self._row_bytes
            while waiting:
                written = os.pwrite(self._file.fileno(), waiting, offset)
                waiting, offset = waiting[written:], offset + written

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def claim_store(
    folder: Path, shape: tuple[int, int, int], about: Mapping[str, Any], warn: Callable[[str], None]
) -> TextIO | None:
    """Take the lock of a store, without waiting. First replace a store that is missing or damaged.

    Args:
        folder: Folder that holds the store.
        shape: (I, N, C) that the features must have.
        about: Describes the features to people, in JSON types.
        warn: Called with one line about a damaged store.

    Returns:
        The lock, to be closed when all rows are done; None while another run holds it.

    Raises:
        OSError: as `create_store`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / LOCK).open("a") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)  # so that nobody else makes or removes a store at the same time
        for half_made in folder.parent.glob(".*.part"):
            shutil.rmtree(half_made, ignore_errors=True)
        if not folder.exists():
            create_store(folder, shape, about)
        lock = try_lock(folder / LOCK)
        damage = find_damage(folder, shape) if lock is not None else None
        if lock is None or damage is None:
            return lock
        warn(f"{damage}; the store is damaged and is made anew")
        with lock:
            _remove_store(folder)
        create_store(folder, shape, about)
        return try_lock(folder / LOCK)


def create_store(folder: Path, shape: tuple[int, int, int], about: Mapping[str, Any]) -> None:
    """Make a store in which no row is done; it appears whole or not at all.

    Args:
        folder: Folder to make; it must not exist.
        shape: (I, N, C) of the features.
        about: Describes the features to people, in JSON types.

    Raises:
        OSError: if the disk has too little space for all features; nothing is left behind.
    """
    with staged_folder(folder, _staging(folder)) as staging:
        _allocate(staging / FEATURES, shape, np.float16)
        _allocate(staging / DONE, shape[:1], np.uint8)
        (staging / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _remove_store(folder: Path) -> None:
    staging = _staging(folder)
    os.rename(folder, staging)
    shutil.rmtree(staging)


def _staging(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


def _allocate(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    # Reserve the space now: on a full disk a write through the map would kill the process without a message.
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def find_damage(folder: Path, shape: tuple[int, int, int]) -> str | None:
    """Return what is wrong with the files of a store, or None."""
    files: tuple[tuple[str, tuple[int, ...], type[np.generic]], ...] = (
        (FEATURES, shape, np.float16),
        (DONE, shape[:1], np.uint8),
    )
    for name, expected_shape, dtype in files:
        try:
            array = np.lib.format.open_memmap(folder / name, mode="r")
        except Exception as error:  # numpy's parser of headers raises more kinds of errors than it documents
            return f"{folder / name}: {error}"
        if array.shape != expected_shape or array.dtype != dtype:
            return f"{folder / name}: holds {array.dtype} {array.shape}, should be {np.dtype(dtype)} {expected_shape}"
    return None


def missing_rows(folder: Path) -> NDArray[np.int64]:
    """Return the rows of a store that are not done, from first to last."""
    return np.flatnonzero(np.load(folder / DONE) != 1)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name, as `state_dict()` gives them."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def store_key(settings: Mapping[str, Any], weights: str, photos: Iterable[str]) -> str:
    """Return a name that changes with anything the features depend on.

    Args:
        settings: What encoder, preprocessing and views are set to, in JSON types.
        weights: `weights_digest` of the encoder.
        photos: Digest of each photo of the split, as `digest_photos` gives them.
    """
    digest = hashlib.sha256(json.dumps({"version": VERSION, **settings}, sort_keys=True).encode())
    digest.update(weights.encode())
    for photo in photos:
        digest.update(bytes.fromhex(photo))
    return digest.hexdigest()[:24]
