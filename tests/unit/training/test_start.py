"""Starting from a model folder: its weights arrive, and a folder that does not fit is refused with what differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from capdist.data.images import Preprocessing
from capdist.errors import CheckpointError
from capdist.model_folder import TrainedModel, save_pretrained
from capdist.models.caption_model import CaptionModel, build_model
from capdist.recipe.decoders import SoftAttentionSection
from capdist.recipe.reading import save_recipe
from capdist.recipe.search import SearchSettings
from capdist.recipe.sections import EncoderSection, Recipe
from capdist.text.vocabulary import Vocabulary
from capdist.training.run import refuse_to_skip
from capdist.training.start import build_network, start_from
from tests.conftest import reset_accelerate

WORDS = Vocabulary(["dog", "cat"])
ENCODER = {"name": "resnet18", "weights": "none", "last_block": "layer1"}
DECODER = {"embed_size": 8, "hidden_size": 8, "attention_size": 8}


def _model(seed: int, encoder: dict[str, object] | None = None, **decoder: object) -> CaptionModel:
    torch.manual_seed(seed)
    return build_model(
        EncoderSection(**(ENCODER | (encoder or {}))),
        SoftAttentionSection(**(DECODER | decoder)),
        vocab_size=6,
        pad_id=0,
    )


def _recipe(encoder: dict[str, object], **decoder: object) -> Recipe:
    return Recipe(encoder=ENCODER | encoder, decoder=DECODER | decoder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    search = SearchSettings(beam_size=3, length_penalty=0.0, min_length=0)
    preprocessing = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    encoder, decoder = EncoderSection(**ENCODER), SoftAttentionSection(**DECODER)
    save_pretrained(TrainedModel(_model(0), WORDS, preprocessing, encoder, decoder, 9, search, {}), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("trainable_from", [None, "layer1"])
def test_all_weights_arrive(folder: Path, trainable_from: str | None) -> None:
    model = _model(1, {"trainable_from": trainable_from}, dropout=0.1)
    expected = _model(0).state_dict()
    assert not all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    start_from(str(folder), model, WORDS, _recipe({"trainable_from": trainable_from}, dropout=0.1))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("encoder", "decoder", "words", "found"),
    [
        ({}, {}, ["dog", "cow"], "words"),
        ({}, {"hidden_size": 16}, ["dog", "cat"], "decoder.hidden_size is 8 there, here 16"),
        ({"last_block": "layer2"}, {}, ["dog", "cat"], "encoder.last_block is 'layer1' there, here 'layer2'"),
        ({"grid": 14}, {}, ["dog", "cat"], "encoder.grid is None there, here 14"),
        ({}, {"gate": True}, ["dog", "cat"], "decoder.gate is False there, here True"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    folder: Path, encoder: dict[str, object], decoder: dict[str, object], words: list[str], found: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        start_from(str(folder), _model(1, encoder, **decoder), Vocabulary(words), _recipe(encoder, **decoder))
    (mistake,) = caught.value.lines
    assert mistake.startswith(f"training.start_from: {folder}: ")
    assert found in mistake
    assert "\n" not in mistake


def test_a_model_folder_in_the_home_of_the_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    recipe = Recipe(encoder=ENCODER, decoder=DECODER, training={"start_from": "~/model"})
    expected = _model(0).state_dict()
    for name, tensor in build_network(recipe, WORDS).state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    reset_accelerate()
    yield Accelerator(cpu=True)
    reset_accelerate()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"run: [", b"run", b"run: 3\n", b"- 1\n", b"run:\n  name: r\n  out", b"\xff\xfe", b"\0"],
)
def test_a_finished_stage_whose_recipe_is_damaged_is_told(
    content: bytes, tmp_path: Path, accelerator: Accelerator
) -> None:
    recipe = Recipe(run={"name": "r", "output_dir": str(tmp_path)})
    (recipe.run_folder / "model").mkdir(parents=True)
    path = recipe.run_folder / "config.yaml"
    save_recipe(recipe, path)
    refuse_to_skip([recipe], accelerator)
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        refuse_to_skip([recipe], accelerator)
    (mistake,) = caught.value.lines
    assert mistake.startswith(f"{path}: is damaged: ")
    assert "\n" not in mistake


@pytest.mark.parametrize(
    ("key", "value", "is_refused"),
    [
        ("training.epochs", 11, True),
        ("training.learning_rate", 0.5, True),
        ("training.log_every", 7, False),
        ("checkpoint.keep", 5, False),
    ],
)
def test_a_finished_stage_keeps_its_length_and_what_it_trained(
    key: str, value: object, is_refused: bool, tmp_path: Path, accelerator: Accelerator
) -> None:
    run = {"name": "r", "output_dir": str(tmp_path)}
    recipe = Recipe(run=run)
    (recipe.run_folder / "model").mkdir(parents=True)
    save_recipe(recipe, recipe.run_folder / "config.yaml")
    section, name = key.split(".")
    changed = Recipe(run=run, **{section: {name: value}})
    if not is_refused:
        refuse_to_skip([changed], accelerator)
        return
    with pytest.raises(CheckpointError, match=f"this stage is over; {key} was .*, now {value}; set it back"):
        refuse_to_skip([changed], accelerator)
