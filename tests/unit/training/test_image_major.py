"""Captions that share an image share its pass through the encoder."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from capdist.data.batches import CaptionBatch, Collator, Sample
from capdist.data.images import Preprocessing
from capdist.features.source import EncodedPhotos
from capdist.models.caption_model import CaptionModel
from capdist.recipe.sections import Recipe
from capdist.training.objectives import CrossEntropy
from capdist.training.step import TrainStep
from tests.models import tiny_model

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

PREPROCESSING = Preprocessing(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def _model() -> CaptionModel:
    layers = OrderedDict(layer1=nn.Conv2d(3, 6, 4, stride=4), bn1=nn.BatchNorm2d(6))
    return tiny_model(layers=layers, encoder={"trainable_from": "all"}, tie_weights=True).train()


def _batch(num_images: int, num_captions: int) -> CaptionBatch:
    samples = [
        Sample(image, image, torch.zeros(3, 8, 8, dtype=torch.uint8), [torch.tensor([2, 3, 4])] * num_captions)
        for image in range(num_images)
    ]
    batch = Collator(num_captions)(samples)
    assert isinstance(batch, CaptionBatch)
    return batch


@pytest.mark.parametrize("num_captions", [1, 5])
def test_a_step_encodes_each_image_once(num_captions: int) -> None:
    model = _model()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    source = EncodedPhotos([], PREPROCESSING, accelerator)
    step = TrainStep(accelerator, prepared, optimizer, Recipe(), source, CrossEntropy(Recipe()))
    rows = []
    for module in model.encoder.network:
        module.register_forward_hook(lambda _, inputs, output: rows.append((len(inputs[0]), len(output))))
    window = [_batch(4, num_captions), _batch(3, num_captions)]
    assert [batch.input_ids.shape[0] for batch in window] == [4 * num_captions, 3 * num_captions]
    report = step(0, window)
    assert report.num_captions == 7 * num_captions
    assert rows == [(4, 4), (4, 4), (3, 3), (3, 3)]
