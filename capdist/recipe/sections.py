"""The recipe: every key of a run, typed and closed. A key that is not declared here is a mistake.

A recipe is a YAML file under `configs/`, and `section.key=value` on the command line overrides it; see
`capdist.recipe.reading`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails

from capdist.errors import Mistake, UsageError, show_value

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
ImageSize = Annotated[int, Field(ge=32, le=2048)]
Rate = Annotated[float, Field(gt=0, le=10)]
Weight = Annotated[float, Field(ge=0)]
PositiveNumber = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(gt=0, lt=1)]
GridSide = Annotated[int, Field(ge=1, le=64)]


@dataclass(frozen=True, kw_only=True)
class Key:
    """What may happen to a key of a recipe. Every key declares one of these; nothing else decides it.

    Attributes:
        stages: Whether the stages of a recipe may differ in the key.
        resume: When `--resume` may change the key: `never`, only while the run is `unfinished`, or `always`.
        layers: Whether the key shapes the network, so that `training.start_from` needs a model with the same value.
    """

    stages: bool
    resume: Literal["never", "unfinished", "always"]
    layers: bool = False


FIXED = Key(stages=False, resume="never")
"""Part of what a recipe is: data, words, chance."""
LAYERS = Key(stages=False, resume="never", layers=True)
"""Part of what the network is."""
PER_STAGE = Key(stages=True, resume="never")
"""Part of what one stage of training is."""
LENGTH = Key(stages=True, resume="unfinished")
"""How long a stage trains: a run that has not ended may end earlier or later."""
FREE = Key(stages=True, resume="always")
"""How a stage is computed or watched: any part of a run may do so differently."""
PLACE = Key(stages=False, resume="always")
"""Where a recipe runs, or where its files are. Other weights or captions in these files are found by their digests."""


class Section(BaseModel):
    """One section of a recipe: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


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


class DecoderSection(Section):
    """The network that turns features into words: the keys that every decoder has."""

    name: Annotated[Name, LAYERS]
    """Chooses the decoder, and with it the other keys of this section."""
    dropout: Annotated[Fraction, PER_STAGE] = 0.5
    """Share of activations that are set to zero in training."""

    def mistakes(self) -> Iterator[Mistake]:
        """Yield what these keys get wrong together."""
        yield from ()


class SoftAttentionSection(DecoderSection):
    """An LSTM that looks at the grid by soft attention before each word (Xu et al. 2015, Show, Attend and Tell)."""

    name: Annotated[Literal["soft_attention"], LAYERS] = "soft_attention"
    """Chooses the LSTM with soft attention."""
    embed_size: Annotated[Positive, LAYERS] = 512
    """Dimensions of a word vector."""
    hidden_size: Annotated[Positive, LAYERS] = 512
    """Dimensions of the hidden state of the LSTM."""
    attention_size: Annotated[Positive, LAYERS] = 512
    """Dimensions in which attention compares a query with the keys of cells."""
    attention: Annotated[Literal["additive", "dot"], LAYERS] = "additive"
    """How a query is compared with the cells: `additive` (Bahdanau et al. 2015) or `dot` products (Vaswani et al.
    2017)."""
    dropout: Annotated[Fraction, PER_STAGE] = 0.5
    """Share of word vectors, and of the hidden state before the output layer, that is set to zero in training."""
    gate: Annotated[bool, LAYERS] = False
    """Scales what attention saw by a learned gate (beta in Xu et al., section 4.2.1)."""
    tie_weights: Annotated[bool, LAYERS] = False
    """Shares one matrix between word vectors and output layer. It needs embed_size = hidden_size."""

    def mistakes(self) -> Iterator[Mistake]:
        """Yield what these keys get wrong together."""
        if self.tie_weights and self.embed_size != self.hidden_size:
            yield Mistake(
                "decoder.tie_weights",
                f"needs decoder.embed_size = decoder.hidden_size, found {self.embed_size} and {self.hidden_size}",
            )


class TransformerSection(DecoderSection):
    """A small Transformer with cross-attention over the grid (Vaswani et al. 2017, Attention Is All You Need)."""

    name: Annotated[Literal["transformer"], LAYERS] = "transformer"
    """Chooses the Transformer."""
    hidden_size: Annotated[Positive, LAYERS] = 512
    """Dimensions of a word vector and of the output of every layer. It must be a multiple of num_heads."""
    num_layers: Annotated[Positive, LAYERS] = 2
    """Number of layers, each with self-attention over words and cross-attention over cells."""
    num_heads: Annotated[Positive, LAYERS] = 8
    """Number of heads of each attention."""
    dropout: Annotated[Fraction, PER_STAGE] = 0.1
    """Share of word vectors, and of the output of each part of a layer, that is set to zero in training."""
    tie_weights: Annotated[bool, LAYERS] = False
    """Shares one matrix between word vectors and output layer."""

    def mistakes(self) -> Iterator[Mistake]:
        """Yield what these keys get wrong together."""
        if self.hidden_size % self.num_heads:
            yield Mistake(
                "decoder.hidden_size",
                f"{self.hidden_size} is not a multiple of decoder.num_heads = {self.num_heads}; make it one",
            )


DECODER_SECTIONS: dict[str, type[DecoderSection]] = {
    "soft_attention": SoftAttentionSection,
    "transformer": TransformerSection,
}
"""The keys of each decoder by its name, the default first. A new decoder needs a class of keys and a line here."""


def _check_by_name(values: Any) -> Any:
    """Check the values of a decoder section by the class that their name chooses."""
    if not isinstance(values, Mapping):
        return values  # a section that is checked already, or a mistake
    name = values.get("name", next(iter(DECODER_SECTIONS)))
    if isinstance(name, str) and name in DECODER_SECTIONS:
        return DECODER_SECTIONS[name].model_validate(values)
    known = " or ".join(map(repr, DECODER_SECTIONS))
    unknown = InitErrorDetails(type="literal_error", loc=("name",), input=name, ctx={"expected": known})
    raise ValidationError.from_exception_data("decoder", [unknown])


AnyDecoderSection = Annotated[SerializeAsAny[DecoderSection], BeforeValidator(_check_by_name)]
"""The section of any decoder of the table, chosen by its name."""


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


_BEAMS_NEEDED = {"length_penalty": 2, "consensus": 3}
"""Fewer beams than this leave a setting nothing to rank."""


class SearchSettings(Section):
    """How captions are searched. Recipes, model folders, `Captioner` and the command line all take these settings."""

    beam_size: Annotated[int, Field(ge=1, le=100), PER_STAGE] = 3
    """Number of beams; 1 is greedy search."""
    length_penalty: Annotated[float, Field(ge=0, le=5), PER_STAGE] = 0.0
    """Divides a beam's log-probability by its length to this power; 0 compares probabilities."""
    no_repeat_ngram: Annotated[NotNegative, PER_STAGE] = 0
    """Blocks repeated n-grams of this many words; 0 allows them."""
    consensus: Annotated[PositiveNumber | None, PER_STAGE] = None
    """Temperature of consensus (MBR) reranking; null picks the most probable candidate. Use about 10 beams."""
    min_length: Annotated[NotNegative, PER_STAGE] = 0
    """Fewest words that a caption has."""

    def __str__(self) -> str:
        """Return what tells this search from others, for the title of a table."""
        others = [name for name in SearchSettings.model_fields if name != "beam_size" and getattr(self, name)]
        changed = [f"{name.replace('_', ' ')} {getattr(self, name):g}" for name in others]
        return ", ".join([f"beam {self.beam_size}", *changed])

    @property
    def search(self) -> SearchSettings:
        """These settings alone, without what a subclass adds."""
        return SearchSettings(**{name: getattr(self, name) for name in SearchSettings.model_fields})

    def changed(self, **changes: Any) -> Self:
        """Return the search with some settings replaced.

        Args:
            changes: Settings by name. None keeps a setting; 0 sets one that may be null to null.

        Raises:
            UsageError: for an unknown name or a value out of bounds; one line each.
        """
        if unknown := [name for name in changes if name not in SearchSettings.model_fields]:
            known = f"known: {', '.join(SearchSettings.model_fields)}"
            raise UsageError(*(Mistake(name, "is no search setting", known) for name in unknown))
        values = {name: value for name, value in changes.items() if value is not None}
        for name, value in values.items():
            if value == 0 and SearchSettings.model_fields[name].default is None:
                values[name] = None
        try:
            return type(self).model_validate({**dict(self), **values})
        except ValidationError as error:
            raise usage_error(error) from None

    def plain(self) -> Self:
        """Return the search for the most probable captions, with as many beams and at least as many words."""
        kept = ("beam_size", "min_length")
        fields = SearchSettings.model_fields.items()
        return self.model_copy(update={name: field.default for name, field in fields if name not in kept})

    def idle(self) -> dict[str, int]:
        """Return the settings that do nothing with so few beams, and how many beams each needs."""
        return {name: n for name, n in _BEAMS_NEEDED.items() if getattr(self, name) and self.beam_size < n}


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


def usage_error(error: ValidationError) -> UsageError:
    """Return the error with one mistake for each value that does not fit its declaration."""
    details = error.errors(include_url=False)
    return UsageError(*(Mistake(str(one["loc"][0]), wrong_value(one)) for one in details))


def wrong_value(details: ErrorDetails) -> str:
    """Return what a value must be, and what it is."""
    message = details["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    message = re.sub(r"^String should match pattern .*", "letters, digits, '.', '-' and '_' only", message)
    message = re.sub(r"^String should have at least 1 character$", "some text", message)
    return f"must be {message}, found {show_value(details['input'])}"


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


def keys_of(section: type[Section]) -> dict[str, FieldInfo]:
    """Return the declarations of a section by key, as a recipe spells it."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def rules_of(section: type[Section]) -> dict[str, Key]:
    """Return what may happen to each key of a section."""
    return {name: next(m for m in field.metadata if isinstance(m, Key)) for name, field in keys_of(section).items()}


def recipe_keys() -> Iterable[tuple[str, str]]:
    """Yield every (section, key) that a recipe may hold, those of all decoders."""
    for section in Recipe.model_fields:
        for name in dict.fromkeys(name for one in section_classes(section) for name in keys_of(one)):
            yield section, name
