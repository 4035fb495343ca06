"""Advice about a recipe: settings that do nothing, or not what they seem to."""

from __future__ import annotations

from collections.abc import Iterator

from capdist.recipe.sections import Recipe


def advise(recipe: Recipe, *, has_validation: bool) -> Iterator[str]:
    """Yield a line for each setting that has no effect, or an effect that few want.

    Args:
        recipe: Is looked at key by key.
        has_validation: Whether the data have a split on which the best model is chosen.
    """
    encoder, training = recipe.encoder, recipe.training
    is_frozen = encoder.trainable_from is None
    if is_frozen and encoder.weights == "none" and training.start_from is None:
        yield "encoder.weights=none with a frozen encoder: its features are random; encoder.trainable_from trains it"
    if is_frozen and encoder.batch_norm == "train":
        yield "encoder.batch_norm=train does nothing: the encoder is frozen"
    if is_frozen and encoder.projection is None and training.word_presence:
        yield "training.word_presence does nothing: no features learn; encoder.projection or encoder.trainable_from do"
    for name, beams in recipe.evaluation.idle().items():
        yield f"evaluation.{name} does nothing with fewer than {beams} beams; raise evaluation.beam_size"
    if not has_validation:
        kept = "training.patience does nothing and " if training.patience else ""
        yield f"there is no validation split: {kept}the newest model counts as the best"
