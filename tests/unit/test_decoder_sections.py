"""The decoder's keys are chosen by its name: a decoder is a class of keys and a line of the table, nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest

from capdist.errors import Mistake, UsageError
from capdist.models import DECODERS
from capdist.recipe.decoders import (
    DECODER_SECTIONS,
    AnyDecoderSection,
    DecoderSection,
    SoftAttentionSection,
    TransformerSection,
)
from capdist.recipe.reading import load_recipe, load_stages, recipe_from_dict, save_recipe
from capdist.recipe.rules import FREE, LAYERS, PER_STAGE, Positive, Section
from capdist.recipe.sections import Recipe, recipe_keys
from capdist.training.checkpoints import recipe_differences
from capdist.training.start import _other_layers


class ToySection(DecoderSection):
    """A decoder of no use."""

    name: Annotated[Literal["toy"], LAYERS] = "toy"
    """Its name."""
    num_layers: Annotated[Positive, LAYERS] = 2
    """Layers."""
    warmth: Annotated[float, PER_STAGE] = 0.5
    """Degrees."""
    label: Annotated[str | None, FREE] = None
    """Some text."""

    def mistakes(self) -> Iterator[Mistake]:
        """Yield what these keys get wrong together."""
        if self.num_layers > 3 and self.dropout == 0:
            yield Mistake("decoder.num_layers", "more than three need decoder.dropout", "set it")


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DECODER_SECTIONS, "toy", ToySection)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def _load(path: Path, text: str, *overrides: str) -> Recipe:
    path.write_text(text)
    return load_recipe(path, overrides)


def _mistakes(path: Path, text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        _load(path, text, *overrides)
    return caught.value.lines


TOY = "decoder: {name: toy, num_layers: 3}\n"


def test_every_decoder_has_its_keys_and_its_network() -> None:
    assert DECODER_SECTIONS.keys() - {"toy"} == DECODERS.keys()
    for name, section in DECODER_SECTIONS.items():
        assert section().name == name


def test_the_name_chooses_the_keys(path: Path) -> None:
    assert _load(path, "").decoder == SoftAttentionSection()
    assert _load(path, "decoder: {gate: true}").decoder == SoftAttentionSection(gate=True)
    assert _load(path, TOY, "decoder.warmth=0.25").decoder == ToySection(num_layers=3, warmth=0.25)
    assert _load(path, "", "decoder.num_layers=4", "decoder.name=toy").decoder == ToySection(num_layers=4)
    assert recipe_from_dict({"decoder": {"name": "toy"}}, "here").decoder == ToySection()
    assert Recipe(decoder=ToySection(warmth=1.0)).decoder == ToySection(warmth=1.0)


def test_all_keys_of_the_chosen_decoder_are_saved_and_no_others(path: Path) -> None:
    recipe = _load(path, TOY)
    expected = {"name": "toy", "dropout": 0.5, "num_layers": 3, "warmth": 0.5, "label": None}
    assert recipe.to_dict()["decoder"] == expected
    assert json.loads(recipe.model_dump_json())["decoder"] == expected
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe


def test_keys_of_all_decoders_are_keys_of_recipes() -> None:
    keys = [key for section, key in recipe_keys() if section == "decoder"]
    assert len(keys) == len(set(keys))
    assert {"dropout", "gate", "num_layers", "label"} <= set(keys)


def test_an_unknown_decoder_lists_the_known(path: Path) -> None:
    (mistake,) = _mistakes(path, "decoder:\n  embed_size: 3\n  name: tyo\n")
    known = " or ".join(repr(name) for name in DECODER_SECTIONS)
    assert mistake == f"{path}:3: decoder.name: must be {known}, found 'tyo' (str)"


@pytest.mark.parametrize("name", ["3", "[toy]", "{a: 1}", "null"])
def test_a_name_is_text(path: Path, name: str) -> None:
    (mistake,) = _mistakes(path, f"decoder:\n  name: {name}\n")
    assert mistake.startswith(f"{path}:2: decoder.name: must be 'soft_attention'")


def test_a_key_of_another_decoder_says_so(path: Path) -> None:
    (mistake,) = _mistakes(path, TOY, "decoder.gate=true")
    assert mistake == (
        "command line: decoder.gate: is a key of decoder.name=soft_attention, not of toy; change decoder.name, or "
        "drop this key"
    )
    (mistake,) = _mistakes(path, "decoder:\n  warmth: 3\n")
    assert mistake == (
        f"{path}:2: decoder.warmth: is a key of decoder.name=toy, not of soft_attention; change decoder.name, or "
        "drop this key"
    )


def test_suggestions_are_of_the_chosen_decoder_and_places_are_kept(path: Path) -> None:
    mistakes = _mistakes(path, "decoder:\n  name: toy\n  num_layer: 3\n  warmth: hot\n")
    assert set(mistakes) == {
        f"{path}:3: decoder.num_layer: unknown key; did you mean 'decoder.num_layers'?",
        f"{path}:4: decoder.warmth: must be number, found 'hot' (str)",
    }
    (mistake,) = _mistakes(path, "decoder:\n  name: toy\n  zzzz: 3\n")
    assert mistake.endswith("; known: dropout, label, name, num_layers, warmth")
    (mistake,) = _mistakes(path, "training:\n  num_layers: 3\n")
    assert mistake.endswith("unknown key; did you mean 'decoder.num_layers'?")


def test_text_of_an_override_is_not_read_as_a_number(path: Path) -> None:
    assert _load(path, TOY, "decoder.label=12").to_dict()["decoder"]["label"] == "12"


def test_each_decoder_has_its_own_rules_across_keys(path: Path) -> None:
    (mistake,) = _mistakes(path, "decoder: {name: toy, num_layers: 4}\n", "decoder.dropout=0.0")
    assert mistake == f"{path}:1: decoder.num_layers: more than three need decoder.dropout; set it"
    sizes = "decoder: {tie_weights: true, embed_size: 8, hidden_size: 16}\n"
    (mistake,) = _mistakes(path, sizes)
    assert mistake.endswith("decoder.tie_weights: needs decoder.embed_size = decoder.hidden_size, found 8 and 16")


def test_stages_keep_the_decoder_and_its_layers(path: Path) -> None:
    path.write_text(f"{TOY}stages:\n  one:\n  two:\n    decoder: {{warmth: 1.0}}\n")
    assert [stage.to_dict()["decoder"]["warmth"] for stage in load_stages(path)] == [0.5, 1.0]
    path.write_text(f"{TOY}stages:\n  one:\n  two:\n    decoder: {{num_layers: 2}}\n")
    with pytest.raises(UsageError, match=r"decoder\.num_layers: must be the same in all stages"):
        load_stages(path)
    path.write_text("stages:\n  one:\n  two:\n    decoder: {name: toy}\n")
    with pytest.raises(UsageError) as caught:
        load_stages(path)
    assert caught.value.lines == (f"{path}:4: decoder.name: must be the same in all stages; set it outside them",)


def test_differences_are_by_the_defaults_and_rules_of_the_decoder() -> None:
    toy = Recipe(decoder=ToySection()).to_dict()
    older = json.loads(json.dumps(toy))
    del older["decoder"]["num_layers"]
    assert not list(recipe_differences(older, toy))
    toy["decoder"] |= {"num_layers": 5, "label": "x"}
    found = {(one.key, one.before, one.now, one.rule) for one in recipe_differences(older, toy)}
    assert found == {("num_layers", 2, 5, LAYERS), ("label", None, "x", FREE)}
    # Another decoder: its name is the difference, not the keys that come with it.
    (other,) = recipe_differences(Recipe().to_dict(), Recipe(decoder=ToySection()).to_dict())
    assert other[:4] == ("decoder", "name", "soft_attention", "toy")


def test_a_model_of_another_decoder_has_other_layers() -> None:
    recipe = Recipe(decoder=ToySection())
    trained: Any = SimpleNamespace(encoder=recipe.encoder, decoder=SoftAttentionSection(gate=True))
    assert list(_other_layers(trained, recipe)) == [("decoder", "name", "soft_attention", "toy")]
    trained.decoder = ToySection(num_layers=5, warmth=1.0)
    assert list(_other_layers(trained, recipe)) == [("decoder", "num_layers", 5, 2)]


class _Folder(Section):
    """As a model folder holds a decoder."""

    decoder: AnyDecoderSection


def test_a_model_folder_reads_the_keys_of_its_decoder() -> None:
    assert _Folder.model_validate_json('{"decoder": {"name": "toy", "warmth": 1}}').decoder == ToySection(warmth=1.0)
    assert _Folder.model_validate_json('{"decoder": {"gate": true}}').decoder == SoftAttentionSection(gate=True)


def test_another_decoder_on_the_command_line_leaves_out_the_keys_of_the_files(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So that every shipped recipe takes `decoder.name`; keys on the command line are still refused."""
    text = "decoder: {embed_size: 8, hidden_size: 16, dropout: 0.25}"
    section = _load(path, text, "decoder.name=transformer", "decoder.num_heads=4").decoder
    assert section.model_dump() == TransformerSection(hidden_size=16, dropout=0.25, num_heads=4).model_dump()
    assert "decoder.name=transformer has no decoder.embed_size; the values of the recipe are left out" in caplog.text
    with pytest.raises(UsageError, match="decoder.gate: is a key of decoder.name=soft_attention"):
        _load(path, text, "decoder.name=transformer", "decoder.gate=true")
    with pytest.raises(UsageError, match="decoder.gate: is a key of decoder.name=soft_attention"):
        _load(path, text, "decoder.gate=true", "decoder.name=transformer")
