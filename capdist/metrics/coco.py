"""Corpus scores of captions that are already split into words, by the reference scorers of `pycocoevalcap`.

They are plain functions, so that the `evaluate` modules and `CaptionScorer` share the same few lines. Each takes
`hypotheses`, one caption an image, and `references`, at least one caption an image, in the same order. A caption is a
list of tokens; an empty one is allowed and scores badly. Each function returns a dictionary of named scores.

Published figures come from these scorers. They are corpus BLEU against the closest reference length (Papineni et al.
2002) and ROUGE-L with beta 1.2 (Lin 2004). The others are CIDEr-D (Vedantam et al. 2015) and METEOR 1.5 (Denkowski and
Lavie 2014).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Tokens = Sequence[str]
Scores = dict[str, float | str | None]
_Table = dict[int, list[str]]


def score_bleu(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Scores:
    """Return `bleu_1` to `bleu_4`, each 0..1; one BLEU of the whole corpus, not a mean over images."""
    from pycocoevalcap.bleu.bleu import Bleu

    scores, _ = Bleu(4).compute_score(*_tables(hypotheses, references), verbose=0)
    return {f"bleu_{order}": float(score) for order, score in enumerate(scores, start=1)}


def score_rouge_l(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Scores:
    """Return `rouge_l`, 0..1, the mean over images."""
    from pycocoevalcap.rouge.rouge import Rouge

    score, _ = Rouge().compute_score(*_tables(hypotheses, references))
    return {"rouge_l": float(score)}


def score_cider(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Scores:
    """Return `cider`, 0..10, the mean over images of CIDEr-D.

    A word weighs more the fewer images mention it. So the score of one image alone is always 0, and scores of different
    sets of images cannot be compared.
    """
    from pycocoevalcap.cider.cider import Cider

    if not any(caption for captions in references for caption in captions):
        return {"cider": 0.0}  # the reference would take the largest of no document frequencies, and fail
    score, _ = Cider().compute_score(*_tables(hypotheses, references))
    return {"cider": float(score)}


def score_captions(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[dict[str, float]]:
    """Return `bleu_4` and `cider` of each caption alone, in their order.

    CIDEr-D counts in how many of all these images a word is mentioned, so its mean is `score_cider` of the same
    images. The BLEU-4 of a caption without a matching 4-gram is almost 0, and its mean is not `score_bleu`.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    tables = _tables(hypotheses, references)
    _, bleu = Bleu(4).compute_score(*tables, verbose=0)
    cider = [0.0] * len(hypotheses)
    if any(caption for captions in references for caption in captions):
        _, cider = Cider().compute_score(*tables)
    return [{"bleu_4": float(b), "cider": float(c)} for b, c in zip(bleu[3], cider, strict=True)]


def score_meteor(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Scores:
    """Return `meteor`, 0..1, or None together with `meteor_reason` where Java is missing or fails."""
    from capdist.metrics.meteor import meteor

    score, reason = meteor(*_tables(hypotheses, references))
    return {"meteor": score} if reason is None else {"meteor": None, "meteor_reason": reason}


SCORERS: dict[str, Callable[[Sequence[Tokens], Sequence[Sequence[Tokens]]], Scores]] = {
    "bleu": score_bleu,
    "rouge_l": score_rouge_l,
    "cider": score_cider,
    "meteor": score_meteor,
}
"""Every metric by the name that `load` and `CaptionScorer.compute` take, in the order of reports."""


def _tables(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[_Table, _Table]:
    """Return references and hypotheses as `pycocoevalcap` wants them: for each image a list of strings."""
    return (
        {image: [" ".join(caption) for caption in captions] for image, captions in enumerate(references)},
        {image: [" ".join(caption)] for image, caption in enumerate(hypotheses)},
    )
