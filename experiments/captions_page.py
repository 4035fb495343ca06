"""A page of captions, best and worst by CIDEr-D, from what `capdist evaluate --output` wrote.

    capdist evaluate MODEL --source flickr8k --path FOLDER --split dev-report --output scores.json
    python experiments/captions_page.py scores.json > docs/captions.md

The page has the model's captions and the names of the photos. It leaves out the photos and the captions of people,
which belong to their owners.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pycocoevalcap.cider.cider import Cider

from capdist.decoding import SearchOptions
from capdist.metrics.ptb import tokenize


def cider_of_images(captions: list[dict[str, Any]]) -> list[float]:
    """Return CIDEr-D of each caption, 0…10, with the document frequencies of all of them."""
    references = {i: [" ".join(tokenize(text)) for text in row["references"]] for i, row in enumerate(captions)}
    said = {i: [" ".join(tokenize(row["caption"]))] for i, row in enumerate(captions)}
    _, scores = Cider().compute_score(references, said)
    return [float(score) for score in scores]


def page(result: dict[str, Any], count: int) -> str:
    """Return the page, Markdown: `count` captions, half of them the best and half the worst."""
    settings, metrics, captions = result["settings"], result["metrics"], result["captions"]
    scored = sorted(zip(cider_of_images(captions), captions, strict=True), key=lambda pair: -pair[0])
    how = SearchOptions(bos_id=1, eos_id=2, **settings["search"])  # which tokens these are is not in the file
    endings = {"a", "an", "the", "of", "with", "in", "on", "and", "to", "at", "is", "are", "by", "from"}
    cut = sum(row["caption"].rstrip(".").split()[-1:] == [word] for row in captions for word in endings)
    figures = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("bleu_1", "bleu_4", "rouge_l", "cider"))
    lines = [
        "# Captions, best and worst",
        "",
        f"The model of [results.md](results.md) wrote these captions: the {count // 2} best and the "
        f"{count - count // 2} worst by CIDEr-D, of the {len(captions)} photos of the split {settings['split']} "
        f"({settings['source']}).",
        f"The search was {how}. All captions together score {figures}.",
        f"Of all {len(captions)} captions, {len({row['caption'] for row in captions})} are different, and {cut} break "
        "off on a word that cannot end one (a, the, of, with, …).",
        "`experiments/captions_page.py` made this page from the output of `capdist evaluate`.",
    ]
    for title, rows in (("Best", scored[: count // 2]), ("Worst", scored[-(count - count // 2) :][::-1])):
        lines += ["", f"## {title}", "", "| CIDEr-D | photo | caption |", "| --- | --- | --- |"]
        lines += [f"| {score:.2f} | {row['image_id']} | {row['caption']} |" for score, row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, help="JSON file of `capdist evaluate`")
    parser.add_argument("--count", type=int, default=50, help="captions on the page (default: %(default)s)")
    arguments = parser.parse_args()
    print(page(json.loads(arguments.scores.read_text(encoding="utf-8")), arguments.count), end="")


if __name__ == "__main__":
    main()
