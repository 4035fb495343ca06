"""The feature store: what a frozen encoder makes of a split, kept on disk and mapped into memory.

Shapes: I images of the split, N cells, C channels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capdist.errors import DataError


class FeatureStore:
    """Features (I, N, C) in float16, one row an image. Memory-mapped: processes share one copy, the system evicts it.

    Args:
        array: As `numpy.load(..., mmap_mode="r")` gives it.
    """

    def __init__(self, array: NDArray[np.float16]) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def features(self, rows: Tensor) -> Tensor:
        """Return float32 features (B, N, C) of rows (B,)."""
        return torch.from_numpy(self.array[rows.numpy()]).float()

    @classmethod
    def open(cls, path: Path) -> FeatureStore:
        """Map a finished store."""
        return cls(np.load(path, mmap_mode="r"))


def create_store(path: Path, num_images: int, num_cells: int, channels: int) -> None:
    """Make an empty store file to be filled through `writable`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (num_images, num_cells, channels)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape).flush()
    # Take the space now: on a full disk a write through the map would kill the process without a word.
    if hasattr(os, "posix_fallocate"):
        try:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError:
            path.unlink()
            raise


def writable(path: Path) -> NDArray[np.float16]:
    """Map a store file for writing."""
    return np.lib.format.open_memmap(path, mode="r+")


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name, as `state_dict()` gives them."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def store_key(settings: Mapping[str, Any], weights: Mapping[str, Tensor], photos: Sequence[Mapping[str, Any]]) -> str:
    """Return a name that changes with anything the features depend on.

    Args:
        settings: Of encoder and preprocessing, JSON types.
        weights: The encoder's tensors by name.
        photos: The split's `image` column with `decode=False`; their bytes are read.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(weights_digest(weights).encode())
    for photo in photos:
        data = photo["bytes"] if photo["bytes"] is not None else _read(photo["path"])
        digest.update(hashlib.blake2b(data, digest_size=16).digest())
    return digest.hexdigest()[:24]
