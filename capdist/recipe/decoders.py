"""The keys of each decoder, chosen by `decoder.name`: a new decoder adds a class and a line of the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails

from capdist.errors import Mistake
from capdist.recipe.rules import (
    LAYERS,
    PER_STAGE,
    Fraction,
    Name,
    Positive,
    Section,
)


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
