"""Features of a split, whether they were stored or are encoded now; no other module needs to know which.

Shapes: B images, N cells, C channels, S pixels a side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from capdist.data.batches import CaptionBatch, PhotoDataset
from capdist.data.images import Preprocessing
from capdist.data.loaders import photo_batches
from capdist.data.splits import Split
from capdist.features.store import FeatureStore


class PhotoEncoder(Protocol):
    """A network that makes features of photos: a `CaptionModel` or an `Ensemble`."""

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return features (B, N, C) of normalised photos (B, 3, S, S)."""
        ...


class FeatureSource(ABC):
    """Features of the photos of a split.

    Attributes:
        photos: What training batches must contain: `path` and/or `bytes` of each row, or None if they need no photos.
    """

    photos: Sequence[Mapping[str, Any]] | None

    @abstractmethod
    def inputs(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Return what `CaptionModel.forward` takes for the photos of a batch: `features` or `pixel_values`."""

    @abstractmethod
    def features(self, model: PhotoEncoder, batch: CaptionBatch) -> Tensor:
        """Return features (B, N, C), without gradients, of the photos of a batch, on the device."""

    @abstractmethod
    def batches(
        self, model: PhotoEncoder, rows: Sequence[int], batch_size: int
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yield rows of the split and their features (B, N, C), without gradients, on the device.

        Args:
            model: Encodes photos whose features are not stored.
            rows: Rows of the split to read, in this order.
            batch_size: How many rows a batch has; the last has fewer.

        Raises:
            DataError: naming the photo that cannot be read.
        """


class StoredFeatures(FeatureSource):
    """Features that an encoder pass stored.

    Args:
        store: Holds the features of all rows.
        device: Where features are needed.
    """

    def __init__(self, store: FeatureStore, device: torch.device) -> None:
        self.photos, self.store, self.device = None, store, device

    def inputs(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """See `FeatureSource.inputs`."""
        return {"features": self._rows(batch.feature_rows)}

    def features(self, model: PhotoEncoder, batch: CaptionBatch) -> Tensor:
        """See `FeatureSource.features`."""
        return self._rows(batch.feature_rows)

    def batches(
        self, model: PhotoEncoder, rows: Sequence[int], batch_size: int
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """See `FeatureSource.batches`."""
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            yield chunk, self._rows(torch.tensor(chunk))

    def _rows(self, rows: Tensor) -> Tensor:
        return self.store.features(rows).to(self.device, non_blocking=True)


class EncodedPhotos(FeatureSource):
    """Features that the model's encoder makes when they are asked for.

    Args:
        photos: Have `path` and/or `bytes` of each row.
        preprocessing: What photos go through before the encoder.
        accelerator: Gives the device and the precision of the encoder.
        num_workers: Number of processes that load photos; 0 loads them in this one.
    """

    def __init__(
        self,
        photos: Sequence[Mapping[str, Any]],
        preprocessing: Preprocessing,
        accelerator: Accelerator,
        num_workers: int = 0,
    ) -> None:
        self.photos: Sequence[Mapping[str, Any]] = photos
        self.preprocessing, self.accelerator, self.num_workers = preprocessing, accelerator, num_workers

    def inputs(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """See `FeatureSource.inputs`."""
        assert batch.images is not None
        return {"pixel_values": self._normalized(batch.images)}

    @torch.no_grad()
    def features(self, model: PhotoEncoder, batch: CaptionBatch) -> Tensor:
        """See `FeatureSource.features`."""
        with self.accelerator.autocast():
            return model.encode(self.inputs(batch)["pixel_values"])

    @torch.no_grad()
    def batches(
        self, model: PhotoEncoder, rows: Sequence[int], batch_size: int
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """See `FeatureSource.batches`."""
        loader = photo_batches(
            PhotoDataset(self.photos, self.preprocessing), rows, batch_size=batch_size, num_workers=self.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )  # fmt: skip
        for batch_rows, images in loader:
            with self.accelerator.autocast():
                features = model.encode(self._normalized(images))
            yield batch_rows.tolist(), features

    def _normalized(self, images: Tensor) -> Tensor:
        return self.preprocessing.normalize(images.to(self.accelerator.device, non_blocking=True))


def feature_sources(
    splits: Mapping[str, Split],
    stores: Mapping[str, FeatureStore],
    preprocessing: Preprocessing,
    accelerator: Accelerator,
    num_workers: int,
) -> dict[str, FeatureSource]:
    """Return the source of each split: its store if it has one, else its photos.

    Args:
        splits: Splits that need a source, by name.
        stores: Stored features by name of the split; a split may lack one.
        preprocessing: What photos go through before the encoder.
        accelerator: Gives the device, and the precision of the encoder.
        num_workers: Number of processes that load photos; 0 loads them in this one.
    """
    return {
        name: StoredFeatures(stores[name], accelerator.device)
        if name in stores
        else EncodedPhotos(split.photos, preprocessing, accelerator, num_workers)
        for name, split in splits.items()
    }
