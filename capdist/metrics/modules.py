"""The caption metrics as modules of the `evaluate` library; made by `capdist.metrics.load`.

The classes live in this package and keep what they are given in memory: no hub, no files, no locks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from capdist.metrics.coco import SCORERS, Scores
from capdist.metrics.ptb import TOKENISER, tokenize

_INPUTS = f"""
Args:
    predictions: One caption an image, a list of strings.
    references: The human captions of each image, a list of lists of strings, one list a prediction.
    tokenize: True (default) splits text into words: {TOKENISER}.
        False takes text that is already split by spaces, as it is.
"""


class CaptionMetric(evaluate.Metric):
    """A caption metric of the whole corpus; the `scorer` of a subclass computes it."""

    scorer: str
    description: str
    citation_text: str

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        strings = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation_text,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": strings, "references": datasets.List(strings)}),
        )

    def _build_data_dir(self) -> str:
        return ""  # the parent makes a folder in the user's cache, which would stay empty

    def add_batch(
        self,
        *,
        predictions: Sequence[str] | None = None,
        references: Sequence[Sequence[str]] | None = None,
        **others: Any,
    ) -> None:
        """Add captions and their references, to be scored together by a later `compute()`.

        Raises:
            ValueError: Nothing given, different counts, or an image without references; says how many.
        """
        _check(predictions, references)
        super().add_batch(predictions=predictions, references=references, **others)

    def compute(
        self,
        *,
        predictions: Sequence[str] | None = None,
        references: Sequence[Sequence[str]] | None = None,
        **options: Any,
    ) -> Scores:
        """Score the captions given here together with those of earlier `add` and `add_batch` calls.

        Raises:
            ValueError: Nothing to score, different counts, or an image without references; says how many.
        """
        if self.writer is None or predictions is not None or references is not None:
            _check(predictions, references)
        scores: Scores = super().compute(predictions=predictions, references=references, **options)
        return scores

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: bool = True
    ) -> Scores:
        split = _split_words if tokenize else str.split
        hypotheses = [split(caption) for caption in predictions]
        return SCORERS[self.scorer](hypotheses, [[split(c) for c in captions] for captions in references])


class Bleu(CaptionMetric):
    """Corpus BLEU with the closest reference length: `bleu_1`, `bleu_2`, `bleu_3`, `bleu_4`."""

    scorer = "bleu"
    description = "Corpus BLEU-1 to BLEU-4 (0..1), closest reference length, as in the COCO caption tools."
    citation_text = "Papineni, Roukos, Ward, Zhu: BLEU, a method for automatic evaluation of machine translation, 2002"


class RougeL(CaptionMetric):
    """ROUGE-L, the mean over images: `rouge_l`."""

    scorer = "rouge_l"
    description = "ROUGE-L (0..1), F-measure with beta 1.2, mean over images, as in the COCO caption tools."
    citation_text = "Lin: ROUGE, a package for automatic evaluation of summaries, 2004"


class Cider(CaptionMetric):
    """CIDEr-D, the mean over images: `cider`."""

    scorer = "cider"
    description = "CIDEr-D (0..10), mean over images, weights from the references, as in the COCO caption tools."
    citation_text = "Vedantam, Zitnick, Parikh: CIDEr, consensus-based image description evaluation, 2015"


class Meteor(CaptionMetric):
    """METEOR 1.5: `meteor`, or None with `meteor_reason` where Java is missing or fails."""

    scorer = "meteor"
    description = "METEOR 1.5 (0..1) by its reference program in Java; None with a reason where that cannot run."
    citation_text = "Denkowski, Lavie: Meteor universal, language specific translation evaluation, 2014"


METRICS = {metric.scorer: metric for metric in (Bleu, RougeL, Cider, Meteor)}
"""The class for each name that `capdist.metrics.load` takes."""


_split_words = tokenize  # under a name that the option `tokenize` does not hide


def _check(predictions: Sequence[str] | None, references: Sequence[Sequence[str]] | None) -> None:
    if predictions is None or references is None:
        raise ValueError("nothing to score: give both predictions and references")
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions but {len(references)} lists of references; give one list each"
        )
    if not len(predictions):
        raise ValueError("nothing to score: 0 predictions and 0 lists of references")
    for image, captions in enumerate(references):
        if isinstance(captions, str):
            raise ValueError(f"references[{image}] is a string; give a list of captions for each image")
    without = [image for image, captions in enumerate(references) if not len(captions)]
    if without:
        raise ValueError(
            f"{len(without)} of {len(references)} images have no references, the first at index {without[0]}"
        )
