"""A model folder: everything needed to caption, nothing else.

`config.json`, `model.safetensors`, `vocabulary.json` and `README.md`. `config.json` holds the digests of the other
two, so a mixed-up or damaged folder is noticed before it captions nonsense.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails

from capdist.data.images import Preprocessing
from capdist.decoding import SearchOptions
from capdist.errors import CapdistError, CheckpointError, StorageError, reason_of, show_value
from capdist.files import set_aside, staged_folder, write_atomically
from capdist.models.caption_model import CaptionModel, build_model
from capdist.recipe.decoders import AnyDecoderSection, DecoderSection
from capdist.recipe.old_names import rename_old_keys
from capdist.recipe.rules import ImageSize, Positive, Section
from capdist.recipe.search import SearchSettings
from capdist.recipe.sections import EncoderSection
from capdist.text.vocabulary import Vocabulary
from capdist.version import __version__

FORMAT = 1
CONFIG, WEIGHTS, VOCABULARY, CARD = "config.json", "model.safetensors", "vocabulary.json", "README.md"

_Spread = Annotated[float, Field(gt=0)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class TrainedModel:
    """A network and what it needs to be used.

    Attributes:
        model: The network, on the CPU in evaluation mode when it comes from a folder.
        vocabulary: Turns ids into words.
        preprocessing: What its photos go through.
        encoder: The section of the recipe that made the encoder.
        decoder: The section of the recipe that made the decoder.
        max_length: Most words it was trained to write.
        search: How it captions unless told otherwise.
        metrics: What it scored, with `split`, and `chosen_on`, the split that it is the best epoch on; empty if nobody
            measured.
        digest: SHA-256 of the weights file; empty if it never was in one.
    """

    model: CaptionModel
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    encoder: EncoderSection
    decoder: DecoderSection
    max_length: int
    search: SearchSettings
    metrics: Mapping[str, Any]
    digest: str = ""

    @property
    def chosen_on(self) -> str | None:
        """Split that it is the best epoch on, or None."""
        # Older folders say only what scored.
        return self.metrics.get("chosen_on", self.metrics.get("split"))


def search_options(search: SearchSettings, vocabulary: Vocabulary, max_length: int) -> SearchOptions:
    """Return the options of a search for captions in the words of a vocabulary, of at most `max_length` words.

    Raises:
        UsageError: as `SearchOptions`.
    """
    return SearchOptions(
        **dict(search.search),
        max_length=max_length,
        pad_id=vocabulary.pad_id,
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        suppressed_ids=vocabulary.suppressed_ids,
    )


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_pretrained(trained: TrainedModel, folder: Path) -> None:
    """Write a model folder, complete under another name and then renamed: `folder` never holds a mixture."""
    from safetensors.torch import save_model

    with staged_folder(folder, folder.with_name(f".tmp_{folder.name}")) as staging:
        with trained.model.without_word_head():
            save_model(trained.model, str(staging / WEIGHTS), metadata={"format": "pt"})
        (staging / VOCABULARY).write_text(trained.vocabulary.to_json(), encoding="utf-8")
        config = _config(trained) | {"sha256": {name: sha256(staging / name) for name in (WEIGHTS, VOCABULARY)}}
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (staging / CARD).write_text(_card(trained), encoding="utf-8")


def update_metrics(trained: TrainedModel, folder: Path) -> None:
    """Write the metrics of an existing model folder anew, leaving its weights and words alone."""
    _read_config(folder / CONFIG)
    config = json.loads((folder / CONFIG).read_bytes()) | {"metrics": dict(trained.metrics)}
    write_atomically(folder / CARD, _card(trained))
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _config(trained: TrainedModel) -> dict[str, Any]:
    encoder = trained.encoder.model_dump(mode="json")
    # The weights are in the folder; where they came from is a path of somebody's machine.
    encoder["weights"] = "none"
    return {
        "format": FORMAT,
        "capdist_version": __version__,
        "encoder": encoder,
        "decoder": trained.decoder.model_dump(mode="json"),
        "preprocessing": asdict(trained.preprocessing),
        "max_length": trained.max_length,
        "search": trained.search.search.model_dump(mode="json"),
        "metrics": dict(trained.metrics),
    }


def load_pretrained(folder_or_hub_id: str | Path) -> TrainedModel:
    """Read and verify a model folder. Nothing in it is executed.

    Args:
        folder_or_hub_id: Names a folder, or a model of the Hugging Face Hub.

    Raises:
        CheckpointError: naming the file that is missing, damaged or foreign.
        StorageError: if a hub id cannot be fetched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    folder = _find(folder_or_hub_id)
    config = _read_config(folder / CONFIG)
    for name, expected in ((WEIGHTS, config.sha256.weights), (VOCABULARY, config.sha256.vocabulary)):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing; a model folder is {CONFIG}, {WEIGHTS} and {VOCABULARY}")
        found = sha256(folder / name)
        if found != expected:
            raise CheckpointError(
                f"{folder / name}: is not the file that {CONFIG} describes (sha256 {found[:12]}…, should be "
                f"{expected[:12]}…); it was damaged or mixed with another model's: copy the folder again"
            )
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    try:
        model = build_model(
            config.encoder,
            config.decoder,
            vocab_size=len(vocabulary),
            pad_id=vocabulary.pad_id,
            load_weights=False,
        )
        load_model(model, folder / WEIGHTS)
    except (CapdistError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: does not describe the weights beside it ({reason_of(error)})"
        ) from None
    return TrainedModel(
        model.eval(),
        vocabulary,
        Preprocessing(**config.preprocessing.model_dump()),
        config.encoder,
        config.decoder,
        config.max_length,
        config.search,
        config.metrics,
        config.sha256.weights,
    )


def _find(folder_or_hub_id: str | Path) -> Path:
    folder = Path(folder_or_hub_id)
    if not folder.exists() and set_aside(folder).is_dir():
        folder = set_aside(folder)  # a save was killed between its two renames
    if folder.exists():
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder}: is not a model folder: no {CONFIG}; `<output_dir>/<name>/model` is one")
        return folder
    name = str(folder_or_hub_id)
    if name.count("/") != 1 or name.startswith((".", "/")) or name.endswith("/"):
        raise CheckpointError(f"{name}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, VOCABULARY, CARD]))
    except Exception as error:  # huggingface_hub and its transports have no common class for "not reachable"
        raise StorageError(
            f"{name}: no such folder, and no such model could be fetched from the Hugging Face Hub "
            f"({type(error).__name__}); check the path, or the network"
        ) from None


class _PreprocessingConfig(Section):
    image_size: ImageSize
    mean: tuple[float, float, float]
    std: tuple[_Spread, _Spread, _Spread]


def _with_new_names(encoder: Any) -> Any:
    return rename_old_keys({"encoder": encoder})[0]["encoder"]


def _check_whole(search: Any) -> Any:
    """Refuse settings of which some were lost. Older folders lack those that may be null, and searched without."""
    if isinstance(search, dict):
        needed = [name for name, field in SearchSettings.model_fields.items() if field.default is not None]
        lost = [InitErrorDetails(type="missing", loc=(name,), input=search) for name in needed if name not in search]
        if lost:
            raise ValidationError.from_exception_data("search", lost)
    return search


class _DigestsConfig(Section):
    weights: _Digest = Field(alias="model.safetensors")
    vocabulary: _Digest = Field(alias="vocabulary.json")


class _Config(BaseModel):
    """What `config.json` must hold; it is foreign input, and what it says is believed only in these bounds."""

    model_config = ConfigDict(strict=True, frozen=True)

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    encoder: Annotated[EncoderSection, BeforeValidator(_with_new_names)]
    decoder: AnyDecoderSection
    preprocessing: _PreprocessingConfig
    max_length: Positive
    search: Annotated[SearchSettings, BeforeValidator(_check_whole)]
    metrics: dict[str, Any]
    sha256: _DigestsConfig


def _read_config(path: Path) -> _Config:
    try:
        config = _Config.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_explain(error)}") from None
    if config.search.min_length > config.max_length:
        raise CheckpointError(
            f"{path}: search.min_length: {config.search.min_length} is more than max_length = {config.max_length}; "
            "no caption could be both; copy the folder again"
        )
    return config


def _explain(error: ValidationError) -> str:
    """Return what is wrong with a config, of several mistakes the one that tells most: such a file is not mended."""
    mistakes = {".".join(map(str, details["loc"])): details for details in error.errors(include_url=False)}
    key, details = next(iter(mistakes.items()))
    if details["type"] == "json_invalid":
        return f"cannot be read ({details['msg']})"
    if not key or any(one["type"] == "missing" and name in _Config.model_fields for name, one in mistakes.items()):
        return "is not the config of a capdist model; foreign checkpoints cannot be read"
    if "format" in mistakes:
        return f"has format {show_value(mistakes['format']['input'])}, this version of capdist reads {FORMAT}"
    if details["type"] == "missing":
        return f"{key}: missing; the file is damaged: copy the folder again"
    if details["type"] == "extra_forbidden":
        *section, name = map(str, details["loc"])
        return f"{'.'.join(section)}: unknown key {name[:60]!r}; the file is damaged, or of another version of capdist"
    reason = details["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key}: must be {reason}, found {show_value(details['input'])}; the file is damaged: copy the folder again"


def _card(trained: TrainedModel) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name="capdist", pipeline_tag="image-to-text", tags=["image-captioning", "lstm"])
    scores = {k: v for k, v in trained.metrics.items() if isinstance(v, float)}
    split = trained.metrics.get("split", "?")
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in scores.items()) or "| - | not measured |"
    return f"""---
{data.to_yaml()}
---
# Image captioner

{trained.encoder.name} encoder, {trained.decoder.name.replace("_", " ")}, {len(trained.vocabulary):,} words.

    capdist caption THIS_FOLDER photo.jpg

| metric on the {split} split | free-running |
| --- | --- |
{rows}

Photos are squashed to {trained.preprocessing.image_size} pixels a side. Captions are lower case without punctuation
and at most {trained.max_length} words. A captioner repeats what its training captions say, prejudices included: do not
use it where a wrong description of a person does harm.
"""
