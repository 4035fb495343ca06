"""The recipe: every key of a run, typed and closed. A key that is not declared here is a mistake.

A recipe is a YAML file under `configs/`, and `section.key=value` on the command line overrides it; see
`capdist.recipe.reading`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from capdist.errors import Mistake, UsageError
from capdist.recipe.decoders import (
    DECODER_SECTIONS,
    AnyDecoderSection,
    DecoderSection,
    SoftAttentionSection,
)
from capdist.recipe.rules import (
    FIXED,
    FREE,
    LAYERS,
    LENGTH,
    PER_STAGE,
    PLACE,
    Decay,
    Fraction,
    GridSide,
    ImageSize,
    Key,
    Name,
    NotNegative,
    Positive,
    PositiveNumber,
    Rate,
    Section,
    Weight,
    keys_of,
)
from capdist.recipe.search import SearchSettings


class RunSection(Section):
    """Where a run lives, and what makes it repeatable."""

    name: Annotated[str, Field(pattern=r"^[\w][\w.\-]*$"), PLACE] = "run"
    """Names the run. Its folder is `<output_dir>/<name>/`."""
    output_dir: Annotated[Name, PLACE] = "runs"
    """Folder that holds the runs and their feature cache."""
    seed: Annotated[NotNegative, FIXED] = 0
    """Decides initial weights, order, augmentation, dropout and samples. The same seed gives the same run."""
    threads: Annotated[Positive | None, PLACE] = None
    """CPU threads of each process; null shares the cores of the machine among its processes.
    `--num_cpu_threads_per_process` of the launcher has no effect."""


class DataSection(Section):
    """Which captioned photos a run uses, and how they reach the model."""

    source: Annotated[Literal["scenes", "flickr8k", "karpathy", "hub", "folder"], FIXED] = "scenes"
    """Kind of data set. `scenes` are drawn by the program and need no files."""
    path: Annotated[str | None, PLACE] = None
    """Folder or file of the source, or the id of a Hugging Face data set. `scenes` takes none."""
    image_size: Annotated[ImageSize, PER_STAGE] = 224
    """Pixels a side to which photos are resized. Their proportions change, but nothing is cut off."""
    batch_size: Annotated[Positive, PER_STAGE] = 32
    """Images in one micro-batch of one process."""
    captions_per_image: Annotated[int, Field(ge=1, le=5), PER_STAGE] = 5
    """Captions that share one encoding of their image in a batch. An epoch shows every caption once, so an image with
    more captions comes several times."""
    num_workers: Annotated[int, Field(ge=0, le=256), FREE] = 0
    """Processes that load photos; 0 loads them in the main process."""
    limit: Annotated[Positive | None, FIXED] = None
    """Uses only the first N images of each split; null uses all."""
    random_crop: Annotated[float, Field(gt=0, le=1), PER_STAGE] = 1.0
    """Smallest share of a photo's area that a random training crop keeps; 1 crops nothing."""
    horizontal_flip: Annotated[bool, PER_STAGE] = False
    """Mirrors half of the training photos at random, and swaps `left` and `right` in their captions."""
    color_jitter: Annotated[float, Field(ge=0, le=1), PER_STAGE] = 0.0
    """Strength of random changes of brightness, contrast and saturation in training; 0 changes nothing."""
    image_column: Annotated[str | None, FIXED] = None
    """Column that holds the image or its file name, for `hub` and `folder`. null looks for a usual name."""
    captions_column: Annotated[str | None, FIXED] = None
    """Column of captions, for `hub` and `folder`: a list, one a row, or a pattern such as `caption_*`. null looks for a
    usual name."""
    id_column: Annotated[str | None, FIXED] = None
    """Column that names the image, for `hub`. null looks for a usual name."""
    split_column: Annotated[str | None, FIXED] = None
    """Column that names the split, for `hub` and `folder`. null takes the splits of the source."""

    @property
    def augments(self) -> bool:
        """Whether training photos differ from epoch to epoch."""
        return self.random_crop < 1 or self.horizontal_flip or self.color_jitter > 0


class TextSection(Section):
    """Which words the model knows."""

    min_frequency: Annotated[Positive, FIXED] = 2
    """Words that occur fewer times than this in the training captions become `<unk>`."""
    max_length: Annotated[int, Field(ge=2, le=200), FIXED] = 20
    """Most words in a caption. Longer training captions are cut, and their number is printed."""


class EncoderSection(Section):
    """The network that turns a photo into a grid of features."""

    name: Annotated[Name, LAYERS] = "resnet50"
    """A torchvision ResNet (`resnet18` to `resnet152`, `resnext…`, `wide_resnet…`), or `timm/<name>` for a network of
    timm."""
    weights: Annotated[Name, PLACE] = "DEFAULT"
    """`DEFAULT` or another name of torchvision downloads weights. A `.pth` or `.safetensors` file is read. `none`
    starts from random weights."""
    last_block: Annotated[Name | None, LAYERS] = None
    """Last block of the network that is used, such as `layer3` or `blocks.6`; null uses all of them."""
    grid: Annotated[GridSide | None, LAYERS] = None
    """Cells a side to which the feature map is average-pooled. null keeps its size; Xu et al. use 14."""
    projection: Annotated[Positive | None, LAYERS] = None
    """Channels of a learned 1x1 convolution over the features; null adds none."""
    trainable_from: Annotated[str | None, PER_STAGE] = None
    """First block that trains, such as `layer3`, or `all`. null keeps the encoder frozen."""
    batch_norm: Annotated[Literal["frozen", "train"], PER_STAGE] = "frozen"
    """Statistics that BatchNorm uses in blocks that train: `frozen` takes the stored ones, `train` those of the
    batch."""
    cache: Annotated[Literal["auto", "off"], FREE] = "auto"
    """`auto` encodes each photo once for all epochs if the encoder is frozen and photos are not augmented, or
    `cache_views` is set. `off` encodes anew in each step."""
    cache_views: Annotated[Positive | None, PER_STAGE] = None
    """Encodes this many augmented views of each training photo once, and uses one an epoch. null augments anew in every
    epoch, without a cache."""
    precision: Annotated[Literal["auto", "inherit", "no", "bf16"], PER_STAGE] = "auto"
    """Arithmetic of a frozen encoder. `auto` takes bf16 where the processor is fast at it, `inherit` takes that of
    training."""
    batch_size: Annotated[Positive, FREE] = 64
    """Images that one process encodes at once for the cache."""
    compile: Annotated[Literal["auto", "on", "off"], FREE] = "auto"
    """Compiles the encoder that fills the cache. `auto` does so once at least 15 minutes of encoding remain."""
    gradient_checkpointing: Annotated[bool, FREE] = False
    """Recomputes activations of the encoder in the backward pass. It saves memory and takes about a third more time."""


class TrainingSection(Section):
    """How the weights change."""

    objective: Annotated[Literal["cross_entropy", "scst"], PER_STAGE] = "cross_entropy"
    """`cross_entropy` learns human captions word by word. `scst` (self-critical training, Rennie et al. 2017) samples
    captions and learns from their scores, see section `scst`."""
    # A resumed run starts from its checkpoint, not from here.
    start_from: Annotated[Name | None, Key(stages=True, resume="always")] = None
    """Model folder whose weights training starts from, those of the encoder too; null starts with new ones."""

    epochs: Annotated[Positive, LENGTH] = 10
    """Passes over all training captions."""
    max_steps: Annotated[Positive | None, LENGTH] = None
    """Stops after this many optimizer steps, even if epochs remain; null sets no such limit."""
    learning_rate: Annotated[Rate, PER_STAGE] = 1e-3
    """Peak learning rate. It is never multiplied by the number of processes."""
    encoder_learning_rate: Annotated[Rate | None, PER_STAGE] = None
    """Peak learning rate of the encoder's blocks that train; null takes learning_rate."""
    optimizer: Annotated[Literal["adam", "adamw"], PER_STAGE] = "adamw"
    """`adam` is by Kingma & Ba (2015), `adamw` by Loshchilov & Hutter (2019)."""
    weight_decay: Annotated[float, Field(ge=0, le=1), PER_STAGE] = 0.0
    """Weight decay of `adamw` on matrices. Biases, norms and word vectors are exempt, also where the output layer
    shares them."""
    schedule: Annotated[Literal["constant", "cosine"], PER_STAGE] = "cosine"
    """Learning rate after warm-up: `constant` keeps the peak, `cosine` goes down to zero along half a cosine."""
    warmup_steps: Annotated[NotNegative, PER_STAGE] = 0
    """Optimizer steps in which the learning rate grows from zero to its peak."""
    accumulation: Annotated[Positive, PER_STAGE] = 1
    """Micro-batches of each process that one optimizer step sums up."""
    clip_norm: Annotated[PositiveNumber | None, PER_STAGE] = 5.0
    """Largest norm of all gradients together. Larger gradients are scaled down to it; null clips nothing."""
    label_smoothing: Annotated[Fraction, PER_STAGE] = 0.1
    """Share of the target probability that is spread over all words (Szegedy et al. 2016). `scst` ignores it."""
    scheduled_sampling: Annotated[Fraction, PER_STAGE] = 0.0
    """Share of input words that the model samples itself at the end of the run; it grows from 0 (Bengio et al. 2015).
    `scst` ignores it."""
    doubly_stochastic: Annotated[Weight, PER_STAGE] = 0.0
    """Weight of the penalty that makes attention look at every cell about once (Xu et al., equation 14). `scst` ignores
    it."""
    word_presence: Annotated[Weight, PER_STAGE] = 0.0
    """Weight of an auxiliary loss: predict from the mean feature which words the captions of an image have (Wu et al.
    2016). Its layer is not saved with the model. `scst` ignores it."""
    mixed_precision: Annotated[Literal["inherit", "no", "bf16", "fp16"], FIXED] = "inherit"
    """Precision of training and captioning; `inherit` takes that of `accelerate launch`."""
    ema_decay: Annotated[Decay | None, PER_STAGE] = None
    """Decay of an exponential moving average (EMA) of the weights, which is then validated and saved. It is capped at
    (1 + t) / (10 + t) in step t, which decides in runs of fewer than 9 / (1 - ema_decay) steps. null averages
    nothing."""
    patience: Annotated[Positive | None, LENGTH] = None
    """Stops after this many validations without a better score; null never does."""
    log_every: Annotated[Positive, FREE] = 10
    """Optimizer steps between two training lines in `log.jsonl`, and off a terminal in the output."""


class ScstSection(Section):
    """Self-critical training, which `training.objective=scst` turns on."""

    samples: Annotated[int, Field(ge=1, le=64), PER_STAGE] = 5
    """Captions that the model samples for each image in a step."""
    baseline: Annotated[Literal["others", "greedy"], PER_STAGE] = "others"
    """Reward that is subtracted. `others` is the mean of the image's other samples (Luo 2020), `greedy` is that of its
    greedy caption (Rennie et al. 2017)."""
    temperature: Annotated[float, Field(gt=0, le=1), PER_STAGE] = 1.0
    """Divides the output logits once, when the run starts. Models trained with label smoothing sample poorly at 1.0;
    try 0.5. To start from a model of `scst`, use 1."""
    cider_weight: Annotated[Weight, PER_STAGE] = 1.0
    """Weight of CIDEr-D (0 to 10) in the reward. Document frequencies come from the training split."""
    bleu_weight: Annotated[Weight, PER_STAGE] = 0.0
    """Weight of BLEU-4 (0 to 1) of the caption in the reward."""
    cross_entropy_weight: Annotated[Weight, PER_STAGE] = 0.0
    """Weight of the cross-entropy of human captions, which is added to the loss."""

    def mistakes(self, recipe: Recipe) -> Iterator[Mistake]:
        """Yield what these keys get wrong together, and with the rest of their recipe."""
        if self.samples == 1 and self.baseline == "others":
            yield Mistake(
                "scst.samples",
                "one sample has no others to be compared with",
                "take 2 or more, or scst.baseline=greedy",
            )
        if self.cider_weight == self.bleu_weight == 0:
            yield Mistake("scst.cider_weight", "nothing is rewarded", "set it or scst.bleu_weight")
        encoder = recipe.encoder
        is_used = recipe.training.objective == "scst"
        if is_used and encoder.batch_norm == "train" and encoder.trainable_from is not None:
            yield Mistake("encoder.batch_norm", "scst learns with the statistics that it samples with", "set frozen")


class EvaluationSection(SearchSettings):
    """Validation: the model captions photos, and its captions are scored."""

    every_epochs: Annotated[Positive, FREE] = 1
    """Epochs between two validations. The last epoch always ends with one."""
    batch_size: Annotated[Positive, FREE] = 64
    """Images that one process captions at once."""
    select_by: Annotated[Literal["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"], PER_STAGE] = "cider"
    """Validation metric that decides which model is the best."""
    halve_validation: Annotated[bool, FIXED] = False
    """Chooses the best model on one half of the validation split and holds out the other, `dev-report`. Without a test
    split, the final scores are those of `dev-report`."""


class CheckpointSection(Section):
    """When a run saves its state, and how many states it keeps."""

    every_steps: Annotated[Positive | None, FREE] = None
    """Optimizer steps between two checkpoints; null saves one at the end of each epoch."""
    keep: Annotated[int, Field(ge=2), FREE] = 2
    """Number of checkpoints to keep, the newest. Two or more, so that one is whole at any moment."""


class TrackingSection(Section):
    """Where a run reports its progress, beside `log.jsonl`."""

    with_: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(alias="with", strict=False), PLACE] = (
        "tensorboard",
    )
    """Trackers to report to."""
    project: Annotated[Name, PLACE] = "capdist"
    """Project of the run in wandb."""


class Recipe(Section):
    """Everything that defines a run."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    text: TextSection = TextSection()
    encoder: EncoderSection = EncoderSection()
    decoder: AnyDecoderSection = SoftAttentionSection()
    training: TrainingSection = TrainingSection()
    scst: ScstSection = ScstSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Recipe:
        mistakes = list(_cross_section_mistakes(self))
        if mistakes:
            raise UsageError(*mistakes)
        return self

    @property
    def run_folder(self) -> Path:
        """Folder of the run, `<output_dir>/<name>`."""
        return Path(os.path.expanduser(self.run.output_dir), self.run.name)

    @property
    def caches_features(self) -> bool:
        """Whether each photo, or each of its `encoder.cache_views`, is encoded once for the whole run."""
        return (
            self.encoder.cache == "auto"
            and self.encoder.trainable_from is None
            and (not self.data.augments or self.encoder.cache_views is not None)
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain JSON types by section and key, as a recipe file spells them."""
        return self.model_dump(mode="json", by_alias=True)


def _cross_section_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    encoder, data = recipe.encoder, recipe.data
    yield from recipe.decoder.mistakes()
    if recipe.evaluation.min_length > recipe.text.max_length:
        yield Mistake(
            "evaluation.min_length",
            f"{recipe.evaluation.min_length} is more than text.max_length = {recipe.text.max_length}",
            "no caption could be both",
        )
    yield from recipe.scst.mistakes(recipe)
    yield from start_in_own_folder(recipe)
    if data.source != "scenes" and data.path is None:
        needed = f"data.source={data.source} needs a folder (data.path=/where/it/is)"
        yield Mistake("data.path", "missing", needed)
    unfreeze = "set encoder.trainable_from, or drop this key"
    if encoder.trainable_from is None and recipe.training.encoder_learning_rate is not None:
        yield Mistake("training.encoder_learning_rate", "the encoder is frozen", unfreeze)
    if encoder.gradient_checkpointing and encoder.trainable_from is None:
        yield Mistake("encoder.gradient_checkpointing", "the encoder is frozen", unfreeze)
    if encoder.gradient_checkpointing and encoder.batch_norm == "train" and encoder.name.startswith("timm/"):
        yield Mistake(
            "encoder.gradient_checkpointing",
            "a timm network would count each batch twice in its BatchNorm statistics",
            "set encoder.batch_norm=frozen, or drop this key",
        )
    if encoder.cache_views is not None and (not data.augments or not recipe.caches_features):
        yield Mistake(
            "encoder.cache_views",
            "needs augmentation (data.random_crop and others), encoder.cache=auto and a frozen encoder, "
            f"found {'' if data.augments else 'no '}augmentation, encoder.cache={encoder.cache} and "
            f"encoder.trainable_from={encoder.trainable_from}",
        )


def start_in_own_folder(recipe: Recipe) -> Iterator[Mistake]:
    """Yield the mistake of a run that would write over what it starts from."""
    start_from, folder = recipe.training.start_from, os.path.abspath(recipe.run_folder)
    if start_from is not None and Path(os.path.abspath(os.path.expanduser(start_from))).is_relative_to(folder):
        found = f"{start_from} is in the folder of this run, which writes there"
        yield Mistake("training.start_from", found, "change run.name")


def section_classes(section: str) -> tuple[type[Section], ...]:
    """Return the classes that may declare the keys of a section: one, or for `decoder` one for each decoder."""
    annotation = Recipe.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, Section)
    return tuple(DECODER_SECTIONS.values()) if issubclass(annotation, DecoderSection) else (annotation,)


def section_class(section: str, values: Mapping[str, Any]) -> type[Section]:
    """Return the class that declares the keys of a section with these values."""
    classes, name = section_classes(section), values.get("name")
    chosen = DECODER_SECTIONS.get(name) if isinstance(name, str) else None
    return chosen if chosen in classes else classes[0]


def recipe_keys() -> Iterable[tuple[str, str]]:
    """Yield every (section, key) that a recipe may hold, those of all decoders."""
    for section in Recipe.model_fields:
        for name in dict.fromkeys(name for one in section_classes(section) for name in keys_of(one)):
            yield section, name
