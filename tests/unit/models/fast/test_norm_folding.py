"""Convolutions that apply their BatchNorm: the same features, gradients and names as the two apart, and never stale."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from capdist.features.encoder_pass import EncoderPass
from capdist.models.encoder import Encoder
from capdist.models.fast.norm_folding import find_pairs, join
from tests.unit.models.backbones import as_backbone, cells, copy_of, make_backbone, photos, saved_bytes

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def _apart(encoder: Encoder, network: nn.Module) -> nn.Module:
    """Put an encoder's weights, modes and choice of parameters into a network that nobody has joined."""
    network.load_state_dict(encoder.network.state_dict())
    for ours, theirs in zip(network.modules(), encoder.network.modules(), strict=True):
        ours.training = theirs.training
    for ours, theirs in zip(network.parameters(), encoder.network.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return network


@pytest.mark.parametrize(
    ("name", "pairs"),
    [("resnet18", 20), ("timm/resnet18", 20), ("timm/mobilenetv2_050", 52), ("timm/tf_efficientnet_lite0", 49)]
    + [("timm/densenet121", 59), ("timm/convnext_atto", 0)],
)
def test_pairs_of_known_networks(name: str, pairs: int) -> None:
    """DenseNet has a BatchNorm before most convolutions, ConvNeXt has none."""
    network = make_backbone(name).network
    found = find_pairs(network)
    assert len(found) == pairs
    assert all(isinstance(network.get_submodule(convolution), nn.Conv2d) for convolution, _ in found)
    assert all(isinstance(network.get_submodule(norm), _BatchNorm) for _, norm in found)
    assert find_pairs(Encoder(make_backbone(name)).network) == found, "an encoder made of the same backbone again"


class _Net(nn.Module):
    """Two convolutions and norms, wired by `run`."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.narrow = nn.Conv2d(8, 8, 1)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _output_read_twice(net: Any, x: Tensor) -> Tensor:
    said = net.conv(x)
    return net.norm(said) + said


def _parameters_read(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) * net.norm.weight.sum()


def _shared_parameters(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) + net.other(x)


def _cannot_be_followed(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) if x.sum() > -1e9 else x


def _plain(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv(x))


def _tied() -> nn.Module:
    net = _Net(_shared_parameters, other=nn.Conv2d(3, 8, 3, bias=False))
    net.other.weight = net.conv.weight
    return net


NETWORKS = {
    "plain": (1, lambda: _Net(_plain)),
    "with a bias and groups": (1, lambda: _Net(_plain, conv=nn.Conv2d(3, 9, 3, groups=3), norm=nn.BatchNorm2d(9))),
    "reflecting": (1, lambda: _Net(_plain, conv=nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"))),
    "tied to a convolution without norm": (1, _tied),
    "output read twice": (0, lambda: _Net(_output_read_twice)),
    "norm before": (0, lambda: _Net(lambda net, x: net.conv(net.norm(x)), norm=nn.BatchNorm2d(3))),
    "convolution called twice": (0, lambda: _Net(lambda net, x: net.norm(net.conv(x)) + net.conv(x))),
    "norm called twice": (0, lambda: _Net(lambda net, x: net.norm(net.narrow(net.norm(net.conv(x)))))),
    "parameters read": (0, lambda: _Net(_parameters_read)),
    "something between": (0, lambda: _Net(lambda net, x: net.norm(torch.relu(net.conv(x))))),
    "cannot be followed": (0, lambda: _Net(_cannot_be_followed)),
    "weight is normalised": (0, lambda: _Net(_plain, conv=StdConv2d(3, 8, 3))),
    "transposed": (0, lambda: _Net(_plain, conv=nn.ConvTranspose2d(3, 8, 3))),
    "norm without statistics": (0, lambda: _Net(_plain, norm=nn.BatchNorm2d(8, track_running_stats=False))),
    "norm without weights": (0, lambda: _Net(_plain, norm=nn.BatchNorm2d(8, affine=False))),
    "another norm": (0, lambda: _Net(_plain, norm=nn.InstanceNorm2d(8))),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_only_what_is_certain_is_folded_and_all_stay_right(case: str) -> None:
    pairs, make = NETWORKS[case]
    torch.manual_seed(0)
    backbone = as_backbone(make().eval(), 8)
    expected = cells(backbone.network(photos()))
    assert len(find_pairs(backbone.network)) == pairs
    encoder = Encoder(backbone)
    torch.testing.assert_close(encoder(photos()), expected, **EXACT)
    torch.testing.assert_close(EncoderPass(encoder)(photos()), expected, **EXACT)


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
@pytest.mark.parametrize(
    ("name", "trainable_from"),
    [
        ("resnet18", "layer4"),
        ("resnet18", "all"),
        ("timm/resnet10t", "layer3"),
        ("timm/tf_mobilenetv3_small_minimal_100", "blocks.3"),
    ]
    + [("timm/tf_efficientnet_lite0", "blocks.5")],
)
def test_gradients_are_those_of_the_two_apart(name: str, trainable_from: str, batch_norm: Any) -> None:
    backbone = make_backbone(name)
    apart = copy_of(backbone).network
    encoder = Encoder(backbone, trainable_from=trainable_from, batch_norm=batch_norm).train()
    _apart(encoder, apart)
    features, expected = encoder(photos(3, 32)), cells(apart(photos(3, 32)))
    torch.testing.assert_close(features, expected, **EXACT)
    weights = torch.randn(features.shape, dtype=torch.float64)
    for output in (features, expected):
        (output * weights).sum().backward()
    largest = max(float(theirs.grad.abs().max()) for theirs in apart.parameters() if theirs.grad is not None)
    for (key, ours), theirs in zip(encoder.network.named_parameters(), apart.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad), key
        if ours.grad is not None:  # that of a shift which batch statistics take out again is only rounding
            atol = max(1e-9 * float(theirs.grad.abs().max()), 1e-13 * largest)
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=atol)
    for key, buffer in apart.named_buffers():
        torch.testing.assert_close(encoder.network.get_buffer(key), buffer, **EXACT)


def test_names_and_parameters_stay_as_they_are() -> None:
    backbone = make_backbone("resnet18")
    before = {key: tensor.clone() for key, tensor in backbone.network.state_dict().items()}
    parameters = [*backbone.network.named_parameters()]
    encoder = Encoder(backbone, trainable_from="layer3")
    join(encoder.network, encoder.pairs)
    after = encoder.network.state_dict()
    assert [*after] == [*before]
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(
        ours is theirs for (_, ours), (_, theirs) in zip(encoder.network.named_parameters(), parameters, strict=True)
    )


def _load(encoder: Encoder) -> None:
    other = make_backbone("resnet18", "layer1").network
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.copy_(tensor * 1.5 + 1)
    encoder.network.load_state_dict(other.state_dict())


def _assign(encoder: Encoder) -> None:
    state = {key: tensor * 2 + 1 for key, tensor in encoder.network.state_dict().items()}
    encoder.network.load_state_dict(state, assign=True)


def _step(encoder: Encoder) -> None:
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    encoder(photos()).square().mean().backward()
    optimizer.step()


def _statistics(encoder: Encoder) -> None:
    encoder.batch_norm = "train"
    encoder.train()(photos() * 3)


def _other_type(encoder: Encoder) -> None:
    encoder.bfloat16().double()


@pytest.mark.parametrize("change", [_load, _assign, _step, _statistics, _other_type])
def test_no_weights_are_older_than_the_networks(change: Callable[[Encoder], None]) -> None:
    backbone = make_backbone("resnet18", "layer1")
    apart = copy_of(backbone).network
    encoder = Encoder(backbone, trainable_from="all")
    before = encoder.eval()(photos())
    change(encoder)
    encoder.eval()
    features = encoder(photos())
    assert not torch.equal(features, before)
    torch.testing.assert_close(features, cells(_apart(encoder, apart)(photos())), **EXACT)


def test_a_copy_has_norms_of_its_own() -> None:
    encoder = Encoder(make_backbone("resnet18", "layer1")).eval()
    before = encoder(photos())
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.copy_(tensor * 2 + 1)
    assert torch.equal(encoder(photos()), before)
    apart = make_backbone("resnet18", "layer1").network
    torch.testing.assert_close(other(photos()), cells(_apart(other, apart)(photos())), **EXACT)


def test_outputs_of_convolutions_are_not_kept() -> None:
    """Of a convolution and its norm, the input of the latter is half of what would be kept."""
    layers = OrderedDict(layer1=nn.Conv2d(3, 8, 3), bn1=nn.BatchNorm2d(8), relu=nn.ReLU(inplace=True))
    backbone = as_backbone(nn.Sequential(layers), 8)
    apart = copy_of(backbone).network
    encoder = Encoder(backbone, trainable_from="all").train()
    activation = 8 * 2 * 8 * 62 * 62
    difference = saved_bytes(_apart(encoder, apart), photos()) - saved_bytes(encoder.network, photos())
    assert difference == pytest.approx(activation, rel=0.05)
