"""Find the best search: beams, length normalisation, repeated n-grams, consensus; chosen on one half of dev.

    python experiments/search_grid.py MODEL --path /where/flickr8k/is

Every search captions `dev-choose`. The best by CIDEr, and the search that the model was validated with, then caption
`dev-report`. That half is held out if the model's epoch was not chosen on it either
(`evaluation.halve_validation=true`). The program prints the rows of `docs/results.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from capdist.data.splits import CHOOSE, REPORT, Split, get_split, read_source
from capdist.distributed.launch import build_accelerator
from capdist.features.source import EncodedPhotos
from capdist.inference.captioner import Captioner
from capdist.inference.writing import write_captions
from capdist.metrics.scorer import CaptionScorer
from capdist.model_folder import search_options
from capdist.recipe.search import SearchSettings
from capdist.recipe.sections import DataSection

BATCH = 50
TRIED: dict[str, list[Any]] = {
    "beam_size": [1, 3, 5, 10], "length_penalty": [0.0, 0.5, 1.0], "no_repeat_ngram": [0, 3], "consensus": [0.0, 4.0],
}  # fmt: skip
"""Search settings, and the values of each that are tried unless the command line gives others; 0 = none."""


class Bench:
    """A split, encoded once, and what is needed to caption and score it."""

    def __init__(self, captioner: Captioner, split: Split) -> None:
        self.captioner, self.split, self.rows = captioner, split, split.scored_rows
        self.image_ids = [split.image_ids[row] for row in self.rows]
        self.features = torch.cat(list(self._encode()))

    @torch.inference_mode()
    def score(self, settings: SearchSettings) -> dict[str, Any]:
        """Return BLEU, ROUGE-L and CIDEr of a search, and `words`, the mean length of its captions."""
        trained = self.captioner.trained
        options = search_options(settings, trained.vocabulary, trained.max_length)
        scorer = CaptionScorer({self.split.image_ids[row]: self.split.references[row] for row in self.rows})
        captions = [
            caption
            for features in self.features.split(BATCH)
            for caption in write_captions(self.captioner.model, features, trained.vocabulary, options)
        ]
        scorer.add_many(zip(self.image_ids, (caption.text for caption in captions), strict=True))
        words = sum(len(caption.words) for caption in captions) / len(captions)
        return {**scorer.compute(("bleu", "rouge_l", "cider")), "words": words}

    @torch.inference_mode()
    def _encode(self) -> Iterator[Tensor]:
        source = EncodedPhotos(self.split.photos, self.captioner.trained.preprocessing, build_accelerator())
        for _, features in source.batches(self.captioner.model, self.rows, BATCH):
            yield features


def grid(own: SearchSettings, asked: argparse.Namespace) -> list[SearchSettings]:
    """Return the searches to try, the model's own first, without those that have a setting without effect."""
    values = product(*(getattr(asked, name) for name in TRIED))
    tried = (own.changed(**dict(zip(TRIED, one, strict=True))) for one in values)
    return list(dict.fromkeys([own, *(search for search in tried if not search.idle())]))


def row(split: str, search: SearchSettings, metrics: Mapping[str, Any]) -> str:
    """Return a row of the table."""
    how = [f"{value:g}" if (value := getattr(search, name)) is not None else "-" for name in TRIED]
    figures = [f"{metrics[name]:.4f}" for name in ("bleu_1", "bleu_4", "rouge_l", "cider")]
    return f"| {' | '.join([split, *how, *figures])} | {metrics['words']:.1f} |"


def main() -> None:
    """Print the table of a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folder; several are an ensemble")
    parser.add_argument("--source", default="flickr8k", help="as data.source (default: %(default)s)")
    parser.add_argument("--path", required=True, help="as data.path")
    parser.add_argument("--image-size", type=int, help="squash photos to so many pixels (default: as the model says)")
    for name, values in TRIED.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, nargs="+", type=type(values[0]), default=values, help="default: %(default)s")
    arguments = parser.parse_args()
    captioner = Captioner.from_pretrained(arguments.models, image_size=arguments.image_size)
    loaded = read_source(DataSection(source=arguments.source, path=arguments.path))
    tried = grid(captioner.trained.search, arguments)
    columns = ["split", *(name.replace("_", " ") for name in TRIED), "BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr", "words"]
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    bench, ciders = Bench(captioner, get_split(loaded, CHOOSE)), []
    for settings in tried:
        metrics = bench.score(settings)
        ciders.append(metrics["cider"])
        print(row(CHOOSE, settings, metrics), flush=True)
    bench = Bench(captioner, get_split(loaded, REPORT))
    for settings in dict.fromkeys([tried[0], tried[ciders.index(max(ciders))]]):
        print(row(REPORT, settings, bench.score(settings)), flush=True)


if __name__ == "__main__":
    main()
