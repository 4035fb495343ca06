"""Which search captions best: beams, length normalisation, repetition, consensus; chosen on one half of dev.

    python benchmarks/search_grid.py MODEL --path /where/flickr8k/is

Every search captions `dev-choose`. The best by CIDEr, and the search the model was trained with, then caption
`dev-report`, on which nothing is chosen. Prints the rows of `docs/results.md`.

Consensus takes, of the beams of a photo, the caption most like the others: the one of the highest mean CIDEr-D, their
words weighed by how few training photos mention them (Bayes risk of Kumar & Byrne 2004, with CIDEr-D as the gain).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capdist.config import DataSection
from capdist.data.batches import PhotoDataset
from capdist.data.captions import reference_ids, tokenize_images
from capdist.data.loaders import photo_batches
from capdist.data.prepared import CHOOSE, REPORT, Split, get_split, read_source
from capdist.decoding import SearchOptions, search
from capdist.inference.captioner import Captioner
from capdist.metrics.rewards import CaptionReward
from capdist.metrics.scorer import CaptionScorer
from capdist.text.tokenizer import detokenize

BATCH = 50
Candidates = list[NDArray[np.int64]]
"""Captions of a photo, best first, each (words,) of token ids."""


@dataclass(frozen=True)
class Search:
    """A row of the table."""

    options: SearchOptions
    consensus: bool

    def __str__(self) -> str:
        options = self.options
        how = f"| {options.beam_size} | {options.length_penalty:g} | {options.no_repeat_ngram} "
        return how + f"| {'yes' if self.consensus else 'no'} "


class Bench:
    """A split, encoded once, and what is needed to caption and score it."""

    def __init__(self, captioner: Captioner, split: Split, training: Sequence[Candidates]) -> None:
        self.captioner, self.split, self.training = captioner, split, training
        self.features = torch.cat(list(self._encode()))

    def score(self, tried: Search) -> dict[str, Any]:
        """Return BLEU, ROUGE-L and CIDEr of a search, and `words`, the mean length of its captions."""
        found = list(self._search(tried.options))
        captions = _consensus(found, self.training) if tried.consensus else [candidates[0] for candidates in found]
        scorer = CaptionScorer(dict(zip(self.split.image_ids, self.split.references, strict=True)))
        texts = [detokenize(self.captioner.trained.vocabulary.decode(caption.tolist())) for caption in captions]
        scorer.add_many(zip(self.split.image_ids, texts, strict=True))
        return {**scorer.compute(("bleu", "rouge_l", "cider")), "words": np.mean([len(words) for words in captions])}

    @torch.inference_mode()
    def _encode(self) -> Iterator[Tensor]:
        preprocessing = self.captioner.trained.preprocessing
        rows = list(range(len(self.split.image_ids)))
        photos = PhotoDataset(self.split.photos, preprocessing)
        for _, images in photo_batches(photos, rows, batch_size=BATCH, num_workers=0, pin_memory=False):
            yield self.captioner.model.encode(preprocessing.normalize(images.to(self.captioner.device)))

    def _search(self, options: SearchOptions) -> Iterator[Candidates]:
        for features in self.features.split(BATCH):
            found = search(self.captioner.model, features, options)
            tokens, lengths = found.tokens.cpu().numpy(), found.lengths.cpu().numpy()
            for of_photo, words in zip(tokens, lengths, strict=True):
                # An empty row stands for no caption, but for the first, which is what the search says.
                yield [
                    row[:count]
                    for rank, (row, count) in enumerate(zip(of_photo, words, strict=True))
                    if count or not rank
                ]


def _consensus(found: Sequence[Candidates], training: Sequence[Candidates]) -> list[NDArray[np.int64]]:
    """Return of each photo the candidate that is most like the candidates; ties go to the more probable."""
    reward = CaptionReward([*training, *found])
    photos = np.repeat(np.arange(len(found)), [len(candidates) for candidates in found])
    captions = [caption for candidates in found for caption in candidates]
    table = np.full((len(captions), max(map(len, captions))), -1, dtype=np.int64)
    for row, caption in zip(table, captions, strict=True):
        row[: len(caption)] = caption
    alike = np.split(reward.cider(photos + len(training), table), np.flatnonzero(np.diff(photos)) + 1)
    return [candidates[int(np.argmax(scores))] for candidates, scores in zip(found, alike, strict=True)]


def _row(split: str, tried: Search, metrics: Mapping[str, Any]) -> str:
    figures = [metrics[name] for name in ("bleu_1", "bleu_4", "rouge_l", "cider")]
    return f"| {split} {tried}| {' | '.join(f'{figure:.4f}' for figure in figures)} | {metrics['words']:.1f} |"


def grid(options: SearchOptions, arguments: argparse.Namespace) -> list[Search]:
    """Return the searches to try, the model's own first."""
    tried = [Search(options, consensus=False)]
    for beams, penalty, ngram in product(arguments.beams, arguments.length_penalties, arguments.no_repeat_ngrams):
        asked = replace(options, beam_size=beams, length_penalty=penalty, no_repeat_ngram=ngram)
        tried += [Search(asked, consensus) for consensus in ((False, True) if beams > 2 else (False,))]
    return list(dict.fromkeys(tried))


def main() -> None:
    """Print the table of a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folder; several are an ensemble")
    parser.add_argument("--source", default="flickr8k", help="as data.source (default: %(default)s)")
    parser.add_argument("--path", required=True, help="as data.path")
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 3, 5, 10])
    parser.add_argument("--length-penalties", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    parser.add_argument("--no-repeat-ngrams", nargs="+", type=int, default=[0, 3])
    arguments = parser.parse_args()
    captioner = Captioner.from_pretrained(arguments.models)
    loaded = read_source(DataSection(source=arguments.source, path=arguments.path))
    words = tokenize_images(get_split(loaded, "train").references)
    training = reference_ids(words, captioner.trained.vocabulary)
    tried = grid(captioner.options(), arguments)
    print(
        "| split | beam | length penalty | no repeated n-gram | consensus | BLEU-1 | BLEU-4 | ROUGE-L | CIDEr | words |"
    )
    print("| --- " * 10 + "|")
    bench, found = Bench(captioner, get_split(loaded, CHOOSE), training), []
    for one in tried:
        found.append(bench.score(one))
        print(_row(CHOOSE, one, found[-1]), flush=True)
    best = max(range(len(tried)), key=lambda number: found[number]["cider"])
    bench = Bench(captioner, get_split(loaded, REPORT), training)
    for one in dict.fromkeys([tried[0], tried[best]]):
        print(_row(REPORT, one, bench.score(one)), flush=True)


if __name__ == "__main__":
    main()
