"""Score a model folder, or several as an ensemble, on a split of any source: what `capdist evaluate` does."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capdist.data.splits import CHOOSE, REPORT, SPLIT_ALIASES, Split, get_split, read_source
from capdist.decoding import SearchOptions
from capdist.distributed.launch import build_accelerator, on_main
from capdist.errors import DataError, UsageError
from capdist.evaluation.evaluator import FAST_METRICS, Evaluation, Evaluator
from capdist.evaluation.report import print_scores
from capdist.features.source import EncodedPhotos
from capdist.files import write_atomically
from capdist.inference.captioner import Captioner
from capdist.metrics import TOKENISER
from capdist.recipe.reading import recipe_from_dict
from capdist.recipe.search import SearchSettings
from capdist.recipe.sections import DataSection
from capdist.version import __version__

logger = logging.getLogger(__name__)


def evaluation_data(
    source: str, path: str | None, *, limit: int | None = None, num_workers: int = 0, overrides: Sequence[str] = ()
) -> DataSection:
    """Return which captioned photos to evaluate on.

    Args:
        source: Kind of data, as `data.source` of a recipe.
        path: Where the data is, as `data.path` of a recipe.
        limit: Keeps only this many images, the first ones; None = all.
        num_workers: Number of processes that load photos; 0 loads them in this one.
        overrides: Settings `data.X_column=name`, as in a recipe.

    Raises:
        UsageError: with one line for each mistake.
    """
    section = {"source": source, "path": path, "limit": limit, "num_workers": num_workers}
    data = recipe_from_dict({"data": section}, "command line", overrides).data
    if idle := [o for o in overrides if not re.match(r"data\.\w+_column=", o)]:
        raise UsageError(
            *(f"{o}: not for evaluating, which takes data.*_column; see the options of --help" for o in idle)
        )
    return data


def evaluate_folder(
    models: Sequence[str],
    data: DataSection,
    split: str,
    *,
    search: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    batch_size: int = 64,
    output: Path | None = None,
) -> dict[str, Any]:
    """Caption and score a split; the main process prints the table and writes `output`.

    Args:
        models: Folders or hub ids of models; if there are several, they form an ensemble.
        data: Says which captioned photos to read.
        split: `train`, `validation` (or `dev`), a half of it (`dev-choose`, `dev-report`) or `test`.
        search: Settings of `SearchSettings` by name; others keep the values that the first model was validated with.
        image_size: Pixels a side to which photos are squashed; None = as the model says.
        batch_size: How many images one process captions at once.
        output: JSON file that the result is written to; None = no file.

    Returns:
        `metrics`, `settings` and `captions`.

    Raises:
        UsageError, DataError, CheckpointError: if the options, the data or a model are not usable.
    """
    if data.limit is not None and SPLIT_ALIASES.get(split, split) in (CHOOSE, REPORT):
        raise UsageError(
            f"--limit: {split} is half of all validation images, not of the first {data.limit}; leave it out"
        )
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"--output: {output.absolute().parent}: no such folder")
    if output is not None and output.is_dir():
        raise UsageError(f"--output: {output}: is a folder; name a file in it")
    accelerator = build_accelerator()
    captioner = Captioner.from_pretrained(models, accelerator.device, image_size)
    rows = _read_split(data, split)
    trained, options = captioner.trained, captioner.options(**(search or {}))
    if rows.name == REPORT and any(member.chosen_on == "validation" for member in captioner.members):
        logger.warning(
            f"{' + '.join(models)}: was chosen on the whole validation split: dev-report tells no more than dev"
        )
    source_of_rows = EncodedPhotos(rows.photos, trained.preprocessing, accelerator, data.num_workers)
    evaluator = Evaluator(accelerator, trained.vocabulary, options, batch_size)
    evaluation = evaluator.evaluate(captioner.model, rows, source_of_rows, (*FAST_METRICS, "meteor"))
    result = _result(captioner, data, rows, options, evaluation)

    def tell() -> None:
        print_scores(f"{' + '.join(models)}: {rows.name} split, {options}", evaluation.metrics)
        if output is not None:
            write_atomically(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    on_main(accelerator, tell)
    return result


def _read_split(data: DataSection, name: str) -> Split:
    split = get_split(read_source(data), name)
    if not split.scored_rows:
        raise DataError(f"data: no image of the {split.name} split has a caption to compare with")
    return split


def _result(
    captioner: Captioner, data: DataSection, split: Split, options: SearchOptions, evaluation: Evaluation
) -> dict[str, Any]:
    references = {split.image_ids[row]: list(split.references[row]) for row in split.scored_rows}
    settings = {
        "split": split.name,
        "source": data.source,
        "image_size": captioner.trained.preprocessing.image_size,
        "beam_size": options.beam_size,
        "search": options.model_dump(include={*SearchSettings.model_fields, "max_length"}),
        "tokeniser": TOKENISER,
        "num_images": len(references),
        "num_references": sum(map(len, references.values())),
        "model_sha256": captioner.trained.digest,
        "members_sha256": [member.digest for member in captioner.members],
        "capdist_version": __version__,
    }
    captions = [
        {"image_id": image_id, "caption": caption, "references": references[image_id]}
        for image_id, caption in evaluation.captions.items()
    ]
    return {"metrics": evaluation.metrics, "settings": settings, "captions": captions}
