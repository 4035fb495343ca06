"""The encoder pass: encode each photo of a split once, shared out over the processes, into the feature store."""

from __future__ import annotations

import os
import uuid
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from capdist.config import Recipe
from capdist.data.batches import PhotoDataset
from capdist.data.features import FeatureStore, create_store, store_key, writable
from capdist.data.images import Preprocessing
from capdist.data.loaders import photo_batches
from capdist.data.prepared import Split
from capdist.models.caption_model import CaptionModel
from capdist.training.launch import on_main


def encode_split(
    accelerator: Accelerator, model: CaptionModel, preprocessing: Preprocessing, split: Split, recipe: Recipe
) -> FeatureStore:
    """Return the features of a split, encoding its photos unless an earlier run has.

    Args:
        accelerator: Of the launch.
        model: With a frozen encoder, on the device.
        preprocessing: Of photos.
        split: Whose photos.
        recipe: Of the run; stores lie in `<output_dir>/.features/`, shared by its runs.

    Raises:
        DataError: if a photo cannot be read.
    """
    encoder = recipe.encoder
    settings = {
        "encoder": {"name": encoder.name, "stage": encoder.stage, "grid": encoder.grid},
        "preprocessing": asdict(preprocessing),
        "mixed_precision": accelerator.mixed_precision,
    }
    key = on_main(accelerator, lambda: store_key(settings, model.encoder.state_dict(), split.photos))
    path = Path(recipe.run.output_dir, ".features", f"{key}.npy")
    if not on_main(accelerator, path.exists):
        _encode(accelerator, model, preprocessing, split, recipe, path)
    return FeatureStore.open(path)


@torch.inference_mode()
def _encode(
    accelerator: Accelerator,
    model: CaptionModel,
    preprocessing: Preprocessing,
    split: Split,
    recipe: Recipe,
    path: Path,
) -> None:
    # A name of this launch alone: another run of the same encoder may be filling its own.
    staging = on_main(accelerator, lambda: path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part"))
    blank = torch.zeros(1, 3, preprocessing.image_size, preprocessing.image_size, device=accelerator.device)
    _, num_cells, channels = model.encode(blank).shape
    on_main(accelerator, lambda: create_store(staging, len(split.photos), num_cells, channels))
    store = writable(staging)
    rows = range(accelerator.process_index, len(split.photos), accelerator.num_processes)
    batches = photo_batches(
        PhotoDataset(split.photos, preprocessing),
        rows,
        batch_size=recipe.evaluation.batch_size,
        num_workers=recipe.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    with tqdm(
        total=len(rows), desc=f"encode {split.name}", unit="photo", disable=not accelerator.is_main_process
    ) as progress:
        for batch_rows, images in batches:
            with accelerator.autocast():
                features = model.encode(preprocessing.normalize(images.to(accelerator.device)))
            store[batch_rows.numpy()] = features.to(torch.float16).cpu().numpy()
            progress.update(len(batch_rows))
    store.flush()  # type: ignore[attr-defined]
    accelerator.wait_for_everyone()
    on_main(accelerator, lambda: os.replace(staging, path))
