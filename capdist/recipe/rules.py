"""What a recipe key is: its type and bounds, and what may happen to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

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


def keys_of(section: type[Section]) -> dict[str, FieldInfo]:
    """Return the declarations of a section by key, as a recipe spells it."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def rules_of(section: type[Section]) -> dict[str, Key]:
    """Return what may happen to each key of a section."""
    return {name: next(m for m in field.metadata if isinstance(m, Key)) for name, field in keys_of(section).items()}
