"""Searches with the decoder against the decoder written plainly, one image and one word at a time.

Shapes: N cells, C channels.
"""

from __future__ import annotations

import pytest
import torch

from capdist.decoding import SearchOptions, search
from capdist.models.caption_model import CaptionModel
from tests.models import tiny_model
from tests.unit.models.plain_decoder import plain_caption

PAD, BOS, EOS = 0, 1, 2
VOCABULARY, CHANNELS, CELLS = 13, 6, 4


def _model(gate: bool, tie_weights: bool = False) -> CaptionModel:
    model = tiny_model(
        channels=CHANNELS, vocab_size=VOCABULARY, attention_size=12, gate=gate, tie_weights=tie_weights, seed=3
    ).double()
    with torch.no_grad():  # large enough for attention and gates to differ from word to word
        for parameter in model.decoder.parameters():
            parameter.mul_(3)
    return model


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize(
    ("options", "ending"), [({"gate": True}, 2), ({"gate": False, "tie_weights": True}, 1)], ids=str
)
def test_search_finds_what_it_finds_one_image_at_a_time(
    options: dict[str, bool], ending: float, beam_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the log-probabilities are those that the plain network gives to the captions found."""
    model = _model(**options).eval()
    with torch.no_grad():  # as sure of itself as a trained network, with captions of different lengths
        model.decoder.head.weight *= 3
        model.decoder.head.bias[EOS] += ending
    select, kept = model.decoder.select, []
    monkeypatch.setattr(model.decoder, "select", lambda state, images: kept.append(images) or select(state, images))
    features = torch.randn(12, CELLS, CHANNELS, generator=torch.Generator().manual_seed(2)).double()
    rules = SearchOptions(
        bos_id=BOS, eos_id=EOS, pad_id=PAD, suppressed_ids=(PAD, BOS), beam_size=beam_size, max_length=9, min_length=1
    )
    found = search(model, features, rules, return_attention=True)
    assert kept or beam_size == 1, "no image was decided before the others"
    for image in range(len(features)):
        alone = search(model, features[image : image + 1], rules, return_attention=True)
        assert torch.equal(found.tokens[image], alone.tokens[0])
        torch.testing.assert_close(found.attention[image], alone.attention[0], rtol=1e-6, atol=1e-6)
        for rank in range(beam_size):
            words = found.tokens[image, rank, : int(found.lengths[image, rank])]
            said = torch.cat([words, torch.tensor([EOS])]) if found.ended[image, rank] else words
            logits, looked = plain_caption(model.decoder, features[image], torch.cat([torch.tensor([BOS]), said[:-1]]))
            log_p = logits.log_softmax(dim=1)[range(len(said)), said].sum().item()
            assert found.log_probabilities[image, rank].item() == pytest.approx(log_p, abs=1e-4)
            attention = found.attention[image, rank, : len(words)].double()
            torch.testing.assert_close(attention, looked[: len(words)], rtol=1e-5, atol=1e-5)
    assert len(set(found.lengths.flatten().tolist())) > 1
