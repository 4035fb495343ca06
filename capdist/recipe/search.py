"""How captions are searched: the settings that recipe, model folder, `Captioner` and command line share."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, ValidationError

from capdist.errors import Mistake, UsageError
from capdist.recipe.rules import PER_STAGE, NotNegative, PositiveNumber, Section, usage_error

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
