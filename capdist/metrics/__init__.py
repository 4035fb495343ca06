"""Caption metrics: BLEU, ROUGE-L, CIDEr-D and METEOR on the words that the COCO caption tools score.

`load(name)` gives a metric of the `evaluate` library; `CaptionScorer` scores a split keyed by image id
without that library. Both go through the reference scorers of `pycocoevalcap` and the tokeniser in
`capdist.metrics.ptb`. Importing this package imports none of these libraries; each is loaded where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capdist.errors import UsageError, nearest
from capdist.metrics.coco import SCORERS
from capdist.metrics.ptb import TOKENISER, tokenize
from capdist.metrics.scorer import CaptionScorer

if TYPE_CHECKING:
    from capdist.metrics.modules import CaptionMetric

__all__ = ["TOKENISER", "CaptionScorer", "load", "tokenize"]


def load(name: str) -> CaptionMetric:
    """Make a caption metric, an `evaluate.Metric`, without the hub and without files.

    Args:
        name: `bleu`, `rouge_l`, `cider` or `meteor`.

    Returns:
        A metric whose `compute(predictions=[str], references=[[str]], tokenize=True)` gives `bleu_1` to
        `bleu_4`, `rouge_l` or `meteor` in 0..1, or `cider` in 0..10; `tokenize=False` takes text already
        split by spaces. METEOR needs Java: without it `meteor` is None and `meteor_reason` says why.

    Raises:
        UsageError: No metric has that name.

    Example:
        >>> load("bleu").compute(predictions=["a dog runs"], references=[["A dog runs."]])  # doctest: +SKIP
        {'bleu_1': 0.999..., 'bleu_2': 0.999..., 'bleu_3': 0.999..., 'bleu_4': 0.0...}
    """
    if name not in SCORERS:
        raise UsageError(f"unknown metric '{name}'{nearest(name, SCORERS)}")
    from capdist.metrics.modules import METRICS

    return METRICS[name]()
