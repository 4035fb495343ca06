"""The encoder pass: all processes together encode each photo of a split once, into its feature store.

It can be stopped, or killed, at any time. The next pass goes on with the photos that are missing.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from capdist.data.batches import PhotoDataset, Views, build_views
from capdist.data.images import Preprocessing
from capdist.data.loaders import photo_batches
from capdist.data.splits import Split
from capdist.distributed.launch import on_main, raise_together
from capdist.distributed.stopping import StopSignals
from capdist.errors import StorageError
from capdist.features.compiling import CompilingEncoder
from capdist.features.digests import digest_photos
from capdist.features.encoder_pass import EncoderPass, encoder_precision
from capdist.features.store import (
    VERSION,
    FeatureStore,
    StoreWriter,
    claim_store,
    missing_rows,
    store_key,
    weights_digest,
)
from capdist.models.caption_model import CaptionModel
from capdist.progress import Progress
from capdist.recipe.sections import EncoderSection, Recipe

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_SHARED = "all machines of a run need run.output_dir on one shared disk"


@dataclass(frozen=True)
class Encoded:
    """A split of which every photo is encoded.

    Attributes:
        split: Name that the split has in the data.
        store: Gives the features of all rows.
        folder: Folder that holds the store.
        unit: What a row is: `photo`, or `view` of one.
        num_present: Number of rows that an earlier run encoded.
        seconds: Seconds that the other rows took.
    """

    split: str
    store: FeatureStore
    folder: Path
    unit: str
    num_present: int
    seconds: float


def encode_splits(
    accelerator: Accelerator,
    model: CaptionModel,
    preprocessing: Preprocessing,
    splits: Mapping[str, Split],
    recipe: Recipe,
) -> list[Encoded]:
    """Return the features of splits, encoding the photos that no earlier run has.

    Args:
        accelerator: Gives the device and the precision, and shares the photos among processes.
        model: Network whose frozen encoder is used; it is on the device.
        preprocessing: Decodes, resizes and normalises photos.
        splits: Splits whose photos are encoded, by name.
        recipe: The run's recipe; all runs below `<output_dir>` share the stores in `<output_dir>/.features/`.

    Raises:
        DataError: if a photo cannot be read; what was encoded before is kept.
        Stopped: after a signal; what was encoded before is kept.
        OSError: if the disk has too little space.
    """
    with StopSignals() as signals:
        encoder = _SplitEncoder(accelerator, model, preprocessing, recipe, signals)
        return [encoder.encode(split) for split in splits.values()]


def _unit(dataset: PhotoDataset) -> str:
    return "photo" if dataset.views is None else "view"


def _named_as_ever(encoder: EncoderSection) -> dict[str, Any]:
    """Return what of the encoder counts for features, under the names that caches of all versions have."""
    return {"name": encoder.name, "stage": encoder.last_block, "grid": encoder.grid}


class _SplitEncoder:
    def __init__(
        self,
        accelerator: Accelerator,
        model: CaptionModel,
        preprocessing: Preprocessing,
        recipe: Recipe,
        signals: StopSignals,
    ) -> None:
        self.accelerator, self.preprocessing = accelerator, preprocessing
        self.recipe, self.signals = recipe, signals
        self.root = recipe.run_folder.with_name(".features")
        self.settings: dict[str, Any] = {
            "encoder": _named_as_ever(recipe.encoder),
            "preprocessing": asdict(preprocessing),
            "precision": encoder_precision(recipe.encoder, accelerator.device, str(accelerator.mixed_precision)),
        }
        self.weights = on_main(accelerator, lambda: weights_digest(model.encoder.state_dict()))
        plain = EncoderPass(model.encoder, self.settings["precision"])
        self.encoder = CompilingEncoder(plain, recipe.encoder.compile)
        blank = torch.zeros(1, 3, preprocessing.image_size, preprocessing.image_size, device=accelerator.device)
        _, *self.grid = plain(blank).shape

    def encode(self, split: Split) -> Encoded:
        views = build_views(self.recipe) if split.name == "train" else None
        dataset = PhotoDataset(split.photos, self.preprocessing, views)
        settings = self.settings | {"views": None if views is None else self._describe(views)}
        folder = self.root / on_main(self.accelerator, lambda: self._key(split, settings))
        self._stop_if_told()
        with self._claim(folder, split.name, len(dataset), settings):
            missing = on_main(self.accelerator, lambda: missing_rows(folder).tolist())
            num_present = len(dataset) - len(missing)
            logger.info(f"features of {split.name}: {num_present:,} of {len(dataset):,} are in {folder}")
            started_s = time.perf_counter()
            if missing:
                self._fill(folder, split.name, dataset, missing)
            self._stop_if_told()
            self._check_whole(folder)
        seconds = time.perf_counter() - started_s
        return Encoded(split.name, FeatureStore.open(folder), folder, _unit(dataset), num_present, seconds)

    def _check_whole(self, folder: Path) -> None:
        if lacking := on_main(self.accelerator, lambda: len(missing_rows(folder))):
            raise StorageError(f"{folder}: lacks {lacking:,} rows that other processes wrote; {_SHARED}")

    def _describe(self, views: Views) -> dict[str, Any]:
        augmentation = self.recipe.data.model_dump(include={"random_crop", "horizontal_flip", "color_jitter"})
        # `drawing` is a version: it changes when capdist draws views in another way.
        return augmentation | {"count": views.count, "seed": views.seed, "drawing": 2}

    def _key(self, split: Split, settings: Mapping[str, Any]) -> str:
        with Progress(f"read {split.name}", len(split.photos), "photo", is_brief=True) as progress:
            # If a signal ends the loop early, the key is wrong, and is not used.
            until_told = takewhile(lambda _: not self.signals.received, progress.each(split.photos))
            return store_key(settings, self.weights, digest_photos(until_told, self.root / "photo_digests.json"))

    @contextmanager
    def _claim(self, folder: Path, split: str, num_rows: int, settings: Mapping[str, Any]) -> Iterator[None]:
        """Hold the lock of a whole store; wait if another run fills it."""
        num_cells, channels = self.grid
        shape = {"rows": num_rows, "cells": num_cells, "channels": channels}
        about = {"version": VERSION, "split": split, **shape, **settings}

        held = ExitStack()

        def claim() -> bool:
            lock = claim_store(folder, (num_rows, num_cells, channels), about, logger.warning)
            if lock is not None:
                held.enter_context(lock)
            return lock is not None

        with held:
            is_waiting = False
            while not on_main(self.accelerator, claim):
                if not is_waiting:
                    logger.info(f"features of {split}: another run is making them in {folder}; waiting for it")
                is_waiting = True
                self._stop_if_told()
                time.sleep(_POLL_S)
            yield

    def _fill(self, folder: Path, split: str, dataset: PhotoDataset, missing: Sequence[int]) -> None:
        batch_size, world = self.recipe.encoder.batch_size, self.accelerator.num_processes
        batches = photo_batches(
            dataset,
            missing[self.accelerator.process_index :: world],
            batch_size=batch_size,
            num_workers=self.recipe.data.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        progress = Progress(
            f"encode {split}", len(dataset), _unit(dataset),
            initial=len(dataset) - len(missing), is_main=self.accelerator.is_main_process,
        )  # fmt: skip
        num_rounds = math.ceil(len(missing) / (batch_size * world))
        with progress:
            writer = self._open(folder)
            try:
                with writer:
                    error = self._encode_all(batches, num_rounds, writer, progress)
            except OSError as caught:  # the newest features could not be written
                error = caught
        raise_together(error)

    def _open(self, folder: Path) -> StoreWriter:
        writer: StoreWriter | None = None
        error: Exception | None = None
        try:
            writer = StoreWriter(folder)
        except FileNotFoundError as missing:
            error = StorageError(f"{missing.filename}: not there, though the main process made it; {_SHARED}")
        except OSError as caught:
            error = caught
        raise_together(error)
        assert writer is not None
        return writer

    def _encode_all(
        self, batches: Iterator[tuple[Tensor, Tensor]], num_rounds: int, writer: StoreWriter, progress: Progress
    ) -> Exception | None:
        """Encode this process's batches until any process fails or is told to stop; return the error of this one."""
        error = None
        for remaining in range(num_rounds, 0, -1):
            encoded = 0
            try:
                encoded = self._encode_next(batches, writer, remaining * self.recipe.encoder.batch_size)
            except Exception as caught:
                error = caught
            num_encoded, ends = self._add_up(encoded, error is not None or self.signals.received > 0)
            progress.update(num_encoded)
            if ends:
                break
        return error

    def _encode_next(self, batches: Iterator[tuple[Tensor, Tensor]], writer: StoreWriter, remaining: int) -> int:
        """Encode this process's next batch; a process with fewer photos ends one batch before the others."""
        rows, images = next(batches, (None, None))
        if rows is None or images is None:
            return 0
        pixel_values = self.preprocessing.normalize(images.to(self.accelerator.device, non_blocking=True))
        writer.put(rows, self.encoder(pixel_values, remaining))
        return len(rows)

    def _add_up(self, encoded: int, ends: bool) -> tuple[int, bool]:
        """Return the photos that all processes encoded, and whether any of them ends here."""
        mine = torch.tensor([encoded, int(ends)], device=self.accelerator.device)
        num_encoded, num_ending = self.accelerator.reduce(mine, "sum").tolist()
        return num_encoded, num_ending > 0

    def _stop_if_told(self) -> None:
        if self.signals.agreed(self.accelerator):
            raise self.signals.stopped(
                self.accelerator,
                "in the encoder pass; the photos encoded so far are kept, and the same command goes on from there "
                "(of a recipe in stages: with --resume)",
            )
