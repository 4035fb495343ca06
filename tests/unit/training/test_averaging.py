"""The moving average against a plain loop, and the weights unharmed by looking at it."""

from __future__ import annotations

import torch
from torch import nn

from capdist.training.averaging import WeightAverage


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    model[0].requires_grad_(False)
    return model


def test_the_average_is_that_of_a_plain_loop() -> None:
    model, decay = _model(), 0.8
    average = WeightAverage(model, decay)
    expected = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for step in range(1, 61):
        with torch.no_grad():
            for parameter in model[1].parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        keep = min(decay, (1 + step) / (10 + step))
        for name, parameter in model[1].named_parameters(prefix="1"):
            expected[name] = keep * expected[name] + (1 - keep) * parameter.detach()
    assert average.tensors.keys() == expected.keys() == {"1.weight", "1.bias"}
    for name, tensor in expected.items():
        torch.testing.assert_close(average.tensors[name], tensor, rtol=0, atol=1e-12)


def test_applying_it_gives_the_average_and_then_the_same_bits_back() -> None:
    model = _model()
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model[1].weight.add_(1.5)
    average.update(3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    averaged = {name: tensor.clone() for name, tensor in average.tensors.items()}
    try:
        with average.applied():
            assert torch.equal(model[1].weight, averaged["1.weight"])
            assert not torch.equal(model[1].weight, before["1.weight"])
            raise KeyError
    except KeyError:
        pass
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    for name, tensor in average.tensors.items():
        assert torch.equal(tensor, averaged[name])
