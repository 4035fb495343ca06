"""Rewards of single captions, fast enough to train on: CIDEr-D and sentence BLEU-4 of token ids.

Self-critical sequence training (Rennie et al. 2017) scores every sampled caption at every step. The scorers of
`pycocoevalcap` count the words of the references again with each call and loop over strings, which would take most of
the step. This module counts references once into sorted tables of integers, and looks up all captions of a call
together. The scores are those of the reference scorers.

Shapes: M images, C reference captions of all images, R rows (captions to score), T tokens a row at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

_LONGEST = 4  # n-grams of 1 to 4 tokens, in both scores
_SIGMA = 6.0  # of CIDEr-D's penalty on lengths

# BLEU as the COCO caption tools smooth it: without a match a caption scores almost 0, never 0/0.
_TINY = 1e-15
_SMALL = 1e-9

# Token ids lie below, so that an n-gram is (number of its first n - 1 tokens) * _BASE + its last token. That stays
# below 2 ** 63 for four thousand million different n-grams, for any n and any size of the vocabulary.
_BASE = 2**31


class _References(NamedTuple):
    """The n-grams of one length n in the references: G different ones, P pairs (image, n-gram), Q (caption, n-gram).

    A pair's occurrences, one for each caption of the image that holds the n-gram, lie side by side.
    """

    grams: Integers  # (G,), ascending: number of the (n-1)-gram that it continues * _BASE + last token
    rarity: Floats  # (G + 1,), log(M / images that mention it); the last entry, index -1, is that of an unknown n-gram
    pairs: Integers  # (P,), ascending: image * G + n-gram
    most: Integers  # (P,), how often the n-gram is in that caption of the image that holds it most often
    first: Integers  # (P,), the pair's first occurrence
    captions: Integers  # (P,), how many occurrences the pair has
    rank: Integers  # (Q,), which of its image's captions the occurrence is in
    weight: Floats  # (Q,), how often it is there * rarity
    norm: Floats  # (C,), Euclidean length of the caption's weights


class _Grams(NamedTuple):
    """The different n-grams of one length in the captions to score, each as often as there are rows that hold it."""

    row: Integers
    gram: Integers  # its number in `_References.grams`, -1 if no reference has it
    times: Integers  # how often the row holds it
    pair: Integers  # its number in `_References.pairs`, -1 if no reference of the row's image has it


class CaptionReward:
    """The reward of a caption: `cider_weight` * CIDEr-D + `bleu_weight` * sentence BLEU-4.

    Scores equal those of `pycocoevalcap` with `references` as its corpus. The rarity of words is counted in all images
    given here, never in the captions scored. An image without captions counts as one that mentions no word. A caption's
    reward does not depend on the other captions of the call. An <eos> counts as a word if the caller leaves it in both
    the references and the captions, which teaches a captioner to end. A reward without it is known to produce captions
    that break off, such as "a dog on a".

    Args:
        references: For each image its captions, each an array (tokens,) of ids from 0 below 2**31. A word
            outside the vocabulary matches nothing if it has an id that is never generated. An image may have
            no captions, a caption no tokens.
        cider_weight: Weight of CIDEr-D, which is 0..10.
        bleu_weight: Weight of BLEU-4, which is 0..1.

    Example:
        >>> dog, car = np.array([5, 6, 7, 8, 9]), np.array([5, 2, 3, 4])
        >>> reward = CaptionReward([[dog], [car]])
        >>> reward(np.array([0, 1]), np.array([[5, 6, 7, 8, 9], [5, 6, 7, -1, -1]])).tolist()
        [10.0, 0.0]
    """

    def __init__(
        self, references: Sequence[Sequence[Integers]], *, cider_weight: float = 1.0, bleu_weight: float = 0.0
    ) -> None:
        assert len(references)
        self._cider_weight, self._bleu_weight = cider_weight, bleu_weight
        captions = [np.asarray(caption, dtype=np.int64) for of_image in references for caption in of_image]
        self._lengths = np.array([len(caption) for caption in captions], dtype=np.int64)  # (C,)
        self._captions = np.array([len(of_image) for of_image in references], dtype=np.int64)  # (M,)
        self._first = np.cumsum(self._captions) - self._captions  # (M,), the image's first caption
        words = np.concatenate([np.zeros(0, dtype=np.int64), *captions])
        assert ((words >= 0) & (words < _BASE)).all()
        self._references = list(self._count_references(words))

    def __call__(self, images: Integers, captions: Integers) -> Floats:
        """Score captions.

        Args:
            images: (R,), which of the references' images each caption describes; images may repeat.
            captions: (R, T), token ids, -1 behind the end; an empty caption is a row of -1.

        Returns:
            (R,), the weighted sum; 0 where the image has no references.
        """
        lengths, counts = self._count(images, captions)
        rewards = np.zeros(len(images))
        if self._cider_weight:
            rewards += self._cider_weight * self._cider(images, lengths, counts)
        if self._bleu_weight:
            rewards += self._bleu_weight * self._bleu_4(images, lengths, counts)
        return rewards

    def _count_references(self, words: Integers) -> Iterator[_References]:
        """Count the n-grams of each length, 1 to 4, in all captions, given one behind the other."""
        images, most_captions = len(self._captions), int(self._captions.max())
        image = np.repeat(np.arange(images), self._captions)
        caption = np.repeat(np.arange(len(self._lengths)), self._lengths)
        gram = np.zeros_like(words)  # of the n-gram that begins here, its number
        for starts, last in _continue(words, self._lengths):
            grams, gram[starts] = np.unique(gram[starts] * _BASE + last, return_inverse=True)
            assert images * len(grams) * max(1, most_captions) < 2**63
            rank = caption[starts] - self._first[image[caption[starts]]]
            pair = image[caption[starts]] * len(grams) + gram[starts]
            occurrences, times = np.unique(pair * most_captions + rank, return_counts=True)
            yield self._weigh(grams, *np.divmod(occurrences, max(1, most_captions)), times)

    def _weigh(self, grams: Integers, pair: Integers, rank: Integers, times: Integers) -> _References:
        """Complete the tables of one n; `pair`, `rank` and `times` are (Q,), in the order of pairs."""
        images = len(self._captions)
        pairs, first, captions = np.unique(pair, return_index=True, return_counts=True)
        mentions = np.bincount(pairs % max(1, len(grams)), minlength=len(grams))
        # One logarithm, of exactly 1 for what every image mentions. A difference of two logarithms might leave a
        # rounding error, and captions of such words alone would then be compared by that error.
        rarity: Floats = np.log(images / np.append(mentions, 1))
        image, gram = np.divmod(pair, max(1, len(grams)))
        weight = times * rarity[gram]
        norm = np.sqrt(np.bincount(self._first[image] + rank, weight**2, minlength=len(self._lengths)))
        most = np.maximum.reduceat(times, first) if len(times) else times
        return _References(grams, rarity, pairs, most, first, captions, rank, weight, norm)

    def _count(self, images: Integers, captions: Integers) -> tuple[Integers, list[_Grams]]:
        """Return the length of each caption, (R,), and for each n, 1 to 4, their n-grams."""
        written = captions >= 0
        assert images.dtype == captions.dtype == np.int64, "narrower integers would overflow"
        assert len(images) == len(captions)
        assert ((images >= 0) & (images < len(self._captions))).all()
        assert (written[:, :-1] >= written[:, 1:]).all(), "-1 in front of a token"
        assert (captions < _BASE).all()
        words, lengths = captions[written], written.sum(axis=1)
        row = np.repeat(np.arange(len(captions)), lengths)
        gram = np.zeros_like(words)  # of the n-gram that begins here, its number among the references
        group = row.copy()  # the same for equal n-grams of one row, known to the references or not
        counts = []
        for references, (starts, last) in zip(self._references, _continue(words, lengths), strict=True):
            # An n-gram that continues an unknown one is negative here, and so unknown itself.
            gram[starts] = _find(gram[starts] * _BASE + last, references.grams)
            _, one, group[starts], times = np.unique(
                group[starts] * _BASE + last, return_index=True, return_inverse=True, return_counts=True
            )
            at = starts[one]
            pair = _find(images[row[at]] * len(references.grams) + gram[at], references.pairs)
            counts.append(_Grams(row[at], gram[at], times, np.where(gram[at] >= 0, pair, -1)))
        return lengths, counts

    def _cider(self, images: Integers, lengths: Integers, counts: list[_Grams]) -> Floats:
        """Return CIDEr-D (Vedantam et al. 2015), (R,).

        That is 10 * the mean over references and n of clipped cosine * exp(-difference in length² / 2 sigma²).
        """
        row, caption = self._compare(images)
        first = np.cumsum(self._captions[images]) - self._captions[images]  # (R,), each row's first comparison
        cosines = np.zeros(len(row))
        for references, grams in zip(self._references, counts, strict=True):
            weight = grams.times * references.rarity[grams.gram]
            norms = np.sqrt(np.bincount(grams.row, weight**2, minlength=len(images)))[row] * references.norm[caption]
            known = grams.pair >= 0
            pair = grams.pair[known]
            shared, at = _spread(references.first[pair], references.captions[pair])
            products = np.minimum(weight[known][shared], references.weight[at]) * references.weight[at]
            comparison = first[grams.row[known]][shared] + references.rank[at]
            dots = np.bincount(comparison, products, minlength=len(row))
            cosines += np.divide(dots, norms, out=np.zeros(len(row)), where=norms > 0)
        # The scorer compares numbers of bigrams, which differ by as much as lengths. An empty caption has no cosine
        # anyway.
        apart = lengths[row] - self._lengths[caption]
        similarities = cosines / _LONGEST * np.exp(-(apart**2) / (2 * _SIGMA**2))
        sums = np.bincount(row, similarities, minlength=len(images))
        return 10.0 * sums / np.maximum(self._captions[images], 1)

    def _bleu_4(self, images: Integers, lengths: Integers, counts: list[_Grams]) -> Floats:
        """Return BLEU-4 of each caption alone, (R,).

        That is the geometric mean of clipped precisions * the penalty on captions shorter than the closest.
        """
        product = np.ones(len(images))
        for n, (references, grams) in enumerate(zip(self._references, counts, strict=True), start=1):
            known = grams.pair >= 0
            matches = np.minimum(grams.times[known], references.most[grams.pair[known]])
            correct = np.bincount(grams.row[known], matches, minlength=len(images))
            product *= (correct + _TINY) / (np.maximum(lengths - n + 1, 0) + _SMALL)
        row, caption = self._compare(images)
        # The least of (difference, length), as one number: of two equally close lengths the shorter counts. Where there
        # are no references it stays the largest number, a length whose penalty leaves 0.
        closest = np.full(len(images), np.iinfo(np.int64).max)
        np.minimum.at(closest, row, np.abs(self._lengths[caption] - lengths[row]) * _BASE + self._lengths[caption])
        ratio = (lengths + _TINY) / (closest % _BASE + _SMALL)
        return product ** (1 / _LONGEST) * np.exp(np.minimum(1 - 1 / ratio, 0))

    def _compare(self, images: Integers) -> tuple[Integers, Integers]:
        """Return every comparison of a row with a reference of its image: the rows and the captions, row by row."""
        return _spread(self._first[images], self._captions[images])


def _continue(words: Integers, lengths: Integers) -> Iterator[tuple[Integers, Integers]]:
    """For n from 1 to 4 yield where n-grams begin in captions that follow each other, and their last tokens."""
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))
    for n in range(1, _LONGEST + 1):
        starts = np.flatnonzero(left >= n)
        yield starts, words[starts + n - 1]


def _find(wanted: Integers, ascending: Integers) -> Integers:
    """Return where each number is in a sorted array, -1 where it is not."""
    at = np.searchsorted(ascending, wanted)
    found = at < len(ascending)
    found[found] = ascending[at[found]] == wanted[found]
    return np.where(found, at, -1)


def _spread(first: Integers, counts: Integers) -> tuple[Integers, Integers]:
    """List the numbers `first[i]` to `first[i] + counts[i] - 1` for each i in order; return the i's and the numbers."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) + (first - np.cumsum(counts) + counts)[owner]
