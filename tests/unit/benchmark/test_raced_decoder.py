"""The textbook has one decoder: a race with any other is refused before anything is encoded."""

from __future__ import annotations

from pathlib import Path

import pytest

from capdist.benchmark.captioning import _trained
from capdist.benchmark.command import _check
from capdist.config import DecoderSection, EncoderSection, Recipe
from capdist.data.images import Preprocessing
from capdist.errors import UsageError
from capdist.model_folder import TrainedModel, save_pretrained
from capdist.models.caption_model import build_model
from capdist.text.vocabulary import Vocabulary

SMALL = {"embed_size": 8, "hidden_size": 8, "attention_size": 8}


def test_a_trained_model_with_another_decoder_is_refused(tmp_path: Path) -> None:
    encoder = EncoderSection(name="resnet18", stage="layer1", weights="none", grid=2)
    decoder, vocabulary = DecoderSection(name="up_down", **SMALL), Vocabulary(["dog"])
    network = build_model(encoder, decoder, vocab_size=len(vocabulary), pad_id=vocabulary.pad_id)
    search = {"beam_size": 3, "length_penalty": 0.0, "no_repeat_ngram": 0, "min_length": 0}
    preprocessing = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    trained = TrainedModel(network, vocabulary, preprocessing, encoder, decoder, 5, search, {})
    save_pretrained(trained, tmp_path / "model")
    nothing_to_encode: object = None
    with pytest.raises(UsageError, match=r"^decoder\.name: .* give --no-textbook"):
        _trained(nothing_to_encode, tmp_path / "model", 1, with_textbook=True)  # type: ignore[arg-type]


def test_the_decoder_of_the_recipe_counts_where_it_is_raced(tmp_path: Path) -> None:
    recipe = Recipe(decoder={"name": "up_down"}, data={"source": "folder", "path": "photos"})
    with pytest.raises(UsageError, match=r"^decoder\.name: "):
        _check(["caption"], recipe, None, with_textbook=True)
    _check(["caption"], recipe, None, with_textbook=False)
    _check(["caption"], recipe, tmp_path / "model", with_textbook=True)
