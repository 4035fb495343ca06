"""The end of a run: score the best model, print the table, show some captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from capdist.console import results
from capdist.data.images import open_photo
from capdist.data.splits import PreparedData, Split
from capdist.distributed.launch import on_main
from capdist.evaluation.evaluator import FAST_METRICS, Evaluation, Evaluator
from capdist.features.source import FeatureSource
from capdist.inference.pictures import save_samples
from capdist.metrics.scorer import CaptionScorer
from capdist.model_folder import load_pretrained, update_metrics
from capdist.recipe.sections import Recipe

NUM_SAMPLES = 8


def final_report(
    recipe: Recipe,
    data: PreparedData,
    evaluator: Evaluator,
    sources: Mapping[str, FeatureSource],
) -> tuple[str, dict[str, Any]]:
    """Score the run's best model on the held-out split, or else on validation, and show the result.

    Returns:
        The split and the metrics, which the model folder then carries.
    """
    split = data.reporting
    folder = recipe.run_folder / "model"
    if split is None:
        return "none", {}
    accelerator = evaluator.accelerator
    trained = load_pretrained(folder)
    evaluation = evaluator.evaluate(
        trained.model.to(accelerator.device), split, sources[split.name], (*FAST_METRICS, "meteor")
    )

    def show() -> None:
        update_metrics(replace(trained, metrics={**trained.metrics, "split": split.name, **evaluation.metrics}), folder)
        title = f"{recipe.run.name}: {split.name} split"
        print_scores(f"{title}, {evaluator.options}", evaluation.metrics, constant_baseline(data, split))
        show_samples(split, evaluation, recipe.run_folder / "samples.png", title)

    on_main(accelerator, show)
    return split.name, evaluation.metrics


def constant_baseline(data: PreparedData, split: Split) -> tuple[str, dict[str, Any]]:
    """Return the most frequent training caption, and its scores when every image gets it."""
    counts = Counter(caption for captions in data.splits["train"].references for caption in captions)
    caption = counts.most_common(1)[0][0]
    references = {split.image_ids[row]: split.references[row] for row in split.scored_rows}
    scorer = CaptionScorer(references)
    scorer.add_many((image_id, caption) for image_id in references)
    return caption, scorer.compute(FAST_METRICS)


def print_scores(title: str, metrics: Mapping[str, Any], constant: tuple[str, Mapping[str, Any]] | None = None) -> None:
    """Print a table of free-running scores, beside those of a constant caption if there is one."""
    from rich.table import Table

    table = Table()
    for column in ("metric", "model", *(["constant caption"] if constant else [])):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for key, value in metrics.items():
        if not isinstance(value, str):
            row = [key, "-" if value is None else f"{value:.4f}"]
            if constant:
                row.append(f"{constant[1][key]:.4f}" if key in constant[1] else "-")
            table.add_row(*row)
    console = results()
    console.print(title)  # the table would break its own title at its width
    console.print(table)
    if constant:
        console.print(f"constant caption: “{constant[0]}”")
    if metrics.get("meteor_reason"):
        console.print(f"meteor: {metrics['meteor_reason']}")


def show_samples(split: Split, evaluation: Evaluation, path: Path, title: str) -> None:
    """Print captions of a few images, evenly spread over the split, and save them as a picture."""
    rows = split.scored_rows
    rows = rows[:: max(1, len(rows) // NUM_SAMPLES)][:NUM_SAMPLES]
    console = results()
    for row in rows:
        image_id = split.image_ids[row]
        console.print(f"{image_id}: {evaluation.captions[image_id]}")
    save_samples(
        [open_photo(split.photos[row]) for row in rows],
        [evaluation.captions[split.image_ids[row]] for row in rows],
        path,
        title,
    )
    console.print(f"pictures: {path}")
