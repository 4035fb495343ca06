"""`caption`: beam search from cached features, beside the textbook's, which takes one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capdist.benchmark import textbook
from capdist.benchmark.measure import matrix_product, shares_of_time, time_in_turns
from capdist.benchmark.report import Row, Table
from capdist.benchmark.workload import Workload
from capdist.data.splits import get_split, read_source
from capdist.decoding import SearchOptions, search
from capdist.features.filling import encode_splits
from capdist.model_folder import load_pretrained, search_options
from capdist.text.vocabulary import Vocabulary

MADE_UP_LENGTH = 11
"""Words in each caption that random weights write: the mean of Flickr8k's captions."""


def caption(
    work: Workload, *, num_images: int, num_plain: int, model: Path | None, repeats: int, trace: Path | None
) -> Table:
    """Time the search over many images, and compare its captions with the textbook's.

    Both search for the most probable captions; the textbook knows no other search.

    Args:
        work: What is measured.
        num_images: How many images capdist captions.
        num_plain: How many of them, the first, the textbook captions; 0 leaves it out.
        model: Model folder of a trained captioner, which captions the validation split of the recipe's source. None =
            random weights over made-up features, with captions of 11 words.
        repeats: How often each contestant is timed.
        trace: File that the profile is written to; None = no profile.
    """
    work, features, options = _made_up(work, num_images) if model is None else _trained(work, model, num_images)
    options = options.plain()
    num_plain = min(num_plain, len(features))
    device, size = work.accelerator.device, work.recipe.evaluation.batch_size
    network = work.model.eval()
    decoder = textbook.decoder_like(network.decoder).eval() if num_plain else None
    first = features[:num_plain]
    found: dict[str, list[tuple[list[int], float]]] = {}

    @torch.inference_mode()
    def own() -> None:
        with work.accelerator.autocast():
            found["capdist"] = [
                caption for batch in features.split(size) for caption in _captions(network, batch.float(), options)
            ]

    @torch.inference_mode()
    def plainly() -> None:
        assert decoder is not None
        with work.accelerator.autocast():
            found["textbook"] = [
                textbook.beam_search(decoder, _as_textbook(work, image.float()), options) for image in first
            ]

    functions: dict[str, Callable[[], object]] = {"matrix product": matrix_product(device, work.dtype)}
    functions |= ({"textbook": plainly} if num_plain else {}) | {"capdist": own}
    timings = time_in_turns(functions, repeats=repeats, device=device)
    counts = {"textbook": float(num_plain), "capdist": float(len(features))}
    rows = [Row.of(name, timing, counts.get(name)) for name, timing in timings.items()]
    shares = shares_of_time(own, device, trace) if trace is not None else {}
    facts = _compare(found, num_plain) if num_plain else {}
    return Table(f"caption, beam {options.beam_size}", "images", rows, shares, facts)


def _captions(network: Any, features: Tensor, options: SearchOptions) -> list[tuple[list[int], float]]:
    result = search(network, features, options)
    best = zip(
        result.tokens[:, 0].tolist(),
        result.lengths[:, 0].tolist(),
        result.log_probabilities[:, 0].tolist(),
        strict=True,
    )
    return [(tokens[:length], log_probability) for tokens, length, log_probability in best]


def _as_textbook(work: Workload, features: Tensor) -> Tensor:
    """Return the features of one image for the textbook, (1, 196, C): projected, and pooled up to 14x14."""
    side = round(len(features) ** 0.5)
    projected = work.model.projection(features)
    grid = projected.T.unflatten(1, (side, side))[None]
    pooled: Tensor = torch.nn.functional.adaptive_avg_pool2d(grid, textbook.GRID)
    return pooled.flatten(2).transpose(1, 2)


def _compare(found: dict[str, list[tuple[list[int], float]]], count: int) -> dict[str, Any]:
    pairs = list(zip(found["textbook"], found["capdist"][:count], strict=True))
    differences = [abs(plain[1] - own[1]) for plain, own in pairs]
    return {
        "same captions as the textbook": f"{sum(plain[0] == own[0] for plain, own in pairs)} of {len(pairs)}",
        "largest difference of log-probability": max(differences),
    }


def _made_up(work: Workload, num_images: int) -> tuple[Workload, Tensor, SearchOptions]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, work.num_cells, work.channels)
    features = torch.randn(shape, generator=generator).relu_().half().to(work.accelerator.device)
    options = SearchOptions(
        bos_id=Vocabulary.bos_id, eos_id=Vocabulary.eos_id, pad_id=Vocabulary.pad_id, suppressed_ids=(0, 1, 3),
        beam_size=work.recipe.evaluation.beam_size, max_length=20, min_length=MADE_UP_LENGTH,
    )  # fmt: skip
    with torch.no_grad():  # random weights alone never end a caption
        work.model.decoder.head.bias[Vocabulary.eos_id] += 20
    return work, features, options


def _trained(work: Workload, folder: Path, num_images: int) -> tuple[Workload, Tensor, SearchOptions]:
    trained = load_pretrained(folder)
    # The features are in the cache if this recipe trained the model.
    recipe = work.recipe.model_copy(update={"encoder": trained.encoder.model_copy(update={"cache": "auto"})})
    model = trained.model.to(work.accelerator.device)
    split = get_split(read_source(recipe.data), "validation")
    store = encode_splits(work.accelerator, model, trained.preprocessing, {split.name: split}, recipe)[0].store
    features = store.features(torch.arange(min(num_images, len(store)))).half().to(work.accelerator.device)
    options = search_options(recipe.evaluation, trained.vocabulary, trained.max_length)
    return replace(work, recipe=recipe, model=model, preprocessing=trained.preprocessing), features, options
