"""The end of a run: score the best model, print the table, show some captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from capdist.console import results
from capdist.data.images import open_photo
from capdist.data.splits import PreparedData, Split
from capdist.distributed.launch import on_main
from capdist.evaluation.evaluator import FAST_METRICS, Evaluation, Evaluator
from capdist.features.source import FeatureSource
from capdist.inference.captioner import Captioner
from capdist.inference.pictures import STRIP_WORDS, Looks, Sample, save_samples
from capdist.metrics.coco import score_captions
from capdist.metrics.ptb import tokenize
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
        samples = pick_samples(split, evaluation, trained.preprocessing.image_size)
        looks = look_at_longest(Captioner(trained, accelerator.device), samples.values())
        show_samples(samples, looks, recipe.run_folder / "samples.png", title)

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


def pick_samples(split: Split, evaluation: Evaluation, image_size: int) -> dict[str, Sample]:
    """Return a few images, evenly spread over the split whatever their captions are, with captions and scores.

    Args:
        split: The split that was captioned.
        evaluation: Its captions.
        image_size: Pixels a side that the model sees; large photos are decoded for it, and still sharp in a picture.

    Returns:
        Samples by image id. The reference is the first of the image; scores are those of the caption alone.
    """
    rows = split.scored_rows
    scores = score_captions(
        [tokenize(evaluation.captions[split.image_ids[row]]) for row in rows],
        [[tokenize(caption) for caption in split.references[row]] for row in rows],
    )
    samples = {}
    for row, score in [*zip(rows, scores, strict=True)][:: max(1, len(rows) // NUM_SAMPLES)][:NUM_SAMPLES]:
        image_id = split.image_ids[row]
        samples[image_id] = Sample(
            photo=open_photo(split.photos[row], image_size),
            caption=evaluation.captions[image_id],
            reference=split.references[row][0],
            score=f"BLEU-4 {score['bleu_4']:.2f}, CIDEr-D {score['cider']:.1f}",
        )
    return samples


def look_at_longest(captioner: Captioner, samples: Iterable[Sample]) -> Looks:
    """Caption the photo with the longest caption that fits into a strip again, and return what each word looked at.

    Where a run computes in less than float32, a word may differ from the caption of the sample.
    """
    longest = max(samples, key=lambda sample: (words := len(sample.caption.split())) * (words <= STRIP_WORDS))
    (caption,) = captioner.caption(longest.photo, return_attention=True)
    assert caption.attention is not None
    return Looks(longest.photo, caption.words, caption.attention)


def show_samples(samples: Mapping[str, Sample], looks: Looks, path: Path, title: str) -> None:
    """Print captions of a few images, each with a reference and scores, and save them as a picture."""
    console = results()
    for image_id, sample in samples.items():
        console.print(f"{image_id}: {sample.caption}", soft_wrap=True)
        console.print(f"    reference: {sample.reference} ({sample.score})", soft_wrap=True)
    save_samples([*samples.values()], path, title, looks)
    console.print(f"pictures: {path}")
