"""What `capdist features` does: encode the photos of a recipe before a training run needs them."""

from __future__ import annotations

from capdist.console import results
from capdist.data.images import Preprocessing
from capdist.data.splits import prepare
from capdist.distributed.launch import build_accelerator
from capdist.errors import UsageError
from capdist.features.filling import Encoded, encode_splits
from capdist.recipe.sections import Recipe
from capdist.training.start import build_network


def fill_cache(recipe: Recipe) -> list[Encoded]:
    """Encode the photos of every split, and print a line for each split.

    Args:
        recipe: Recipe that later runs will train with.

    Raises:
        UsageError: if such a run would not use the cache.
        CheckpointError: if training.start_from does not fit the recipe.
        DataError, OSError, Stopped: as `encode_splits`.
    """
    if not recipe.caches_features:
        raise UsageError(_why_not(recipe))
    accelerator = build_accelerator(recipe)
    data = prepare(recipe)
    model = build_network(recipe, data.vocabulary).to(accelerator.device)
    preprocessing = Preprocessing(recipe.data.image_size, model.encoder.mean, model.encoder.std)
    encoded = encode_splits(accelerator, model, preprocessing, data.splits, recipe)
    if accelerator.is_main_process:
        console = results()
        for one in encoded:
            console.print(describe(one), soft_wrap=True)
    accelerator.end_training()
    return encoded


def describe(encoded: Encoded) -> str:
    """Return a line about a split: numbers of photos or views, how many existed already, speed, size and place."""
    num_rows = len(encoded.store)
    num_new = num_rows - encoded.num_present
    speed = f"{num_new / encoded.seconds:,.1f} {encoded.unit}s/s" if num_new else "nothing to do"
    size = sum(path.stat().st_size for path in encoded.folder.iterdir())
    return (
        f"{encoded.split}: {num_rows:,} {encoded.unit}s, {encoded.num_present:,} were there already, {speed}, "
        f"{size / 1e6:,.1f} MB in {encoded.folder}"
    )


def _why_not(recipe: Recipe) -> str:
    encoder = recipe.encoder
    if encoder.cache == "off":
        return "encoder.cache: is off, so that a run would not use cached features; set encoder.cache=auto"
    if encoder.trainable_from is not None:
        return (
            f"encoder.trainable_from: {encoder.trainable_from} trains, so that features change and are not cached; "
            "set encoder.trainable_from=null"
        )
    return (
        "encoder.cache_views: missing; photos are augmented anew in every epoch, so that features are not cached; set "
        "it to the number of views to cache, or data.random_crop=1.0 data.horizontal_flip=false data.color_jitter=0.0"
    )
