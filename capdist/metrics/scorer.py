"""Scores of a whole split, keyed by image id; captions may come in any order and from any process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from capdist.errors import DataError, UsageError, nearest
from capdist.metrics.coco import SCORERS, Scores
from capdist.metrics.ptb import tokenize


class CaptionScorer:
    """Collect one caption for each image of a split, in any order and from any process, then score them all.

    An image that is added twice counts once: the first caption stays.

    Args:
        references: For each image id its captions, raw text; these are the images that must be captioned.

    Raises:
        DataError: There are no images, or an image has no captions; names how many and the first three ids.

    Example:
        >>> scorer = CaptionScorer({"a.jpg": ["A dog runs.", "The dog is running."], "b.jpg": ["A red car."]})
        >>> scorer.add("b.jpg", "a red car")
        >>> scorer.add("a.jpg", "a dog runs")
        >>> round(scorer.compute(["rouge_l"])["rouge_l"], 2)
        1.0
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        if not references:
            raise DataError("no images to score: the references are empty")
        without = [image_id for image_id, captions in references.items() if not captions]
        if without:
            raise DataError(f"{_some(without, len(references))} without reference captions")
        self._references = {image_id: tuple(captions) for image_id, captions in references.items()}
        self._captions: dict[str, str] = {}

    def add(self, image_id: str, caption: str) -> None:
        """Add the caption of one image, raw text; if the image has one already, this one is dropped."""
        self._captions.setdefault(image_id, caption)

    def add_many(self, captions: Iterable[tuple[str, str]]) -> None:
        """Add (image id, caption) pairs, as `add` does, in their order."""
        for image_id, caption in captions:
            self.add(image_id, caption)

    @property
    def captions(self) -> dict[str, str]:
        """The caption of every image, raw text, in the order of the references.

        Raises:
            DataError: An image was never captioned, or an unknown one was; names how many and the first three
                ids.
        """
        missing = [image_id for image_id in self._references if image_id not in self._captions]
        unknown = [image_id for image_id in self._captions if image_id not in self._references]
        mistakes = []
        if missing:
            mistakes.append(f"{_some(missing, len(self._references))} never captioned; caption every image once")
        if unknown:
            mistakes.append(f"{_some(unknown, len(self._captions))} captioned that the references do not know")
        if mistakes:
            raise DataError(*mistakes)
        return {image_id: self._captions[image_id] for image_id in self._references}

    def compute(self, names: Iterable[str] = tuple(SCORERS)) -> Scores:
        """Score the captions of all images against their references.

        Args:
            names: Metrics to compute: `bleu`, `rouge_l`, `cider`, `meteor`.

        Returns:
            `bleu_1` to `bleu_4`, `rouge_l` and `meteor` in 0..1, `cider` in 0..10. Where Java is missing or
            fails, `meteor` is None and `meteor_reason` says why.

        Raises:
            DataError: As for `captions`.
            UsageError: A name that is not a metric.
        """
        names = list(names)
        for name in names:
            if name not in SCORERS:
                raise UsageError(f"unknown metric '{name}'{nearest(name, SCORERS)}")
        hypotheses = [tokenize(caption) for caption in self.captions.values()]
        references = [[tokenize(caption) for caption in captions] for captions in self._references.values()]
        scores: Scores = {}
        for name in names:
            scores.update(SCORERS[name](hypotheses, references))
        return scores


def _some(image_ids: Sequence[str], total: int) -> str:
    """Return `"2 of 5 images (a.jpg, b.jpg)"`, naming three at most."""
    named = ", ".join(image_ids[:3]) + (", …" if len(image_ids) > 3 else "")
    return f"{len(image_ids)} of {total} images ({named})"
