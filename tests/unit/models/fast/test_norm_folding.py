"""Convolutions that apply their BatchNorm: features, gradients and names are those of the two layers apart."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from capdist.features.encoder_pass import EncoderPass
from capdist.models.encoder import Backbone, Encoder, build_backbone
from capdist.models.fast.norm_folding import AppliedNorm2d, NormedConv2d, find_pairs, fold_norms, join_norms
from tests.unit.models.backbones import as_backbone, cells, copy_of, joined, make_backbone, photos, saved_bytes

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def _apart(encoder: Encoder, network: nn.Module) -> nn.Module:
    """Give a network that is not joined an encoder's weights, modes and choice of parameters."""
    network.load_state_dict(encoder.network.state_dict())
    for (name, ours), (other, theirs) in zip(network.named_modules(), encoder.network.named_modules(), strict=True):
        assert name == other
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
    assert {module for pair in found for module in pair} <= {*network.modules()}
    join_norms(network)
    modules = [*network.modules()]
    assert sum(isinstance(module, NormedConv2d) for module in modules) == pairs
    assert sum(isinstance(module, AppliedNorm2d) for module in modules) == pairs
    join_norms(network)
    assert [*network.modules()] == modules, "joining again changed a network that was joined"


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


def _with_two_names() -> nn.Module:
    net = _Net(_plain)
    net.also_conv, net.also_norm = net.conv, net.norm
    return net


def _hooked() -> nn.Module:
    net = _Net(_plain)
    net.norm.register_forward_hook(lambda module, inputs, output: output + 1)
    return net


def _in_a_list(*names: str) -> nn.Module:
    """Return a network that calls these of its layers from a list, where torch cannot see them."""

    def run(net: Any, x: Tensor) -> Tensor:
        for name in ("conv", "norm"):
            x = net.layers[name](x) if name in net.layers else getattr(net, name)(x)
        return x

    net = _Net(run)
    net.layers = {name: getattr(net, name) for name in names}
    return net


NETWORKS = {
    "plain": (1, lambda: _Net(_plain)),
    "with a bias and groups": (1, lambda: _Net(_plain, conv=nn.Conv2d(3, 9, 3, groups=3), norm=nn.BatchNorm2d(9))),
    "reflecting": (1, lambda: _Net(_plain, conv=nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"))),
    "tied to a convolution without norm": (1, _tied),
    "with two names": (1, _with_two_names),
    "a hook on the norm": (0, _hooked),
    "a hook makes the weight": (0, lambda: _Net(_plain, conv=spectral_norm(nn.Conv2d(3, 8, 3)))),
    "convolution in a list": (0, lambda: _in_a_list("conv")),
    "norm in a list": (0, lambda: _in_a_list("norm")),
    "both in a list": (0, lambda: _in_a_list("conv", "norm")),
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
@torch.no_grad()
def test_only_certain_pairs_are_joined_and_every_network_stays_right(case: str) -> None:
    pairs, make = NETWORKS[case]
    torch.manual_seed(0)
    backbone = as_backbone(make().eval(), 8)
    expected = cells(backbone.network(photos()))
    torch.testing.assert_close(EncoderPass(Encoder(backbone))(photos()), expected, **EXACT)
    encoder = Encoder(joined(backbone))
    assert sum(isinstance(module, NormedConv2d) for module in encoder.modules()) == pairs
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
    encoder = Encoder(joined(backbone), trainable_from=trainable_from, batch_norm=batch_norm).train()
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


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t", "timm/tf_efficientnet_lite0"])
def test_joining_changes_no_name_parameter_or_buffer(name: str) -> None:
    """The order counts too: an optimizer's state is stored by it."""
    network = make_backbone(name).network

    def look() -> list[tuple[str, int, bytes]]:
        tensors = [*network.named_parameters(), *network.named_buffers()]
        return [(key, id(tensor), tensor.detach().numpy().tobytes()) for key, tensor in tensors]

    before, keys, children = look(), [*network.state_dict()], [key for key, _ in network.named_modules()]
    join_norms(network)
    assert any(isinstance(module, NormedConv2d) for module in network.modules())
    assert look() == before
    assert [*network.state_dict()] == keys
    assert [key for key, _ in network.named_modules()] == children


def test_a_layer_with_two_names_is_replaced_under_both() -> None:
    net: Any = _with_two_names().eval()
    join_norms(net)
    assert type(net.conv) is NormedConv2d
    assert net.also_conv is net.conv
    assert net.also_norm is net.norm


def test_joining_leaves_the_old_layers_as_they_were() -> None:
    net = _Net(_plain).eval()
    convolution, norm = net.conv, net.norm
    expected = convolution(photos().float())
    join_norms(net)
    assert type(net.conv) is NormedConv2d
    assert (type(convolution), type(norm)) == (nn.Conv2d, nn.BatchNorm2d)
    assert torch.equal(convolution(photos().float()), expected)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t"])
def test_joining_draws_no_random_numbers(name: str) -> None:
    found = []
    for joins_norms in (True, False):
        torch.manual_seed(3)
        state = build_backbone(name, joins_norms=joins_norms).network.state_dict()
        found.append((state, torch.rand(4)))
    (ours, next_ours), (theirs, next_theirs) = found
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(next_ours, next_theirs)


def test_only_capdists_own_networks_are_joined() -> None:
    assert any(isinstance(module, NormedConv2d) for module in build_backbone("resnet18").network.modules())
    plain = build_backbone("resnet18", joins_norms=False).network
    assert not any(isinstance(module, NormedConv2d | AppliedNorm2d) for module in plain.modules())


@pytest.mark.parametrize("settings", [{}, {"trainable_from": "all"}, {"trainable_from": "all", "batch_norm": "train"}])
def test_a_network_given_to_an_encoder_keeps_its_modules(settings: dict[str, Any]) -> None:
    network = make_backbone("resnet18", "layer1").network
    plain = copy.deepcopy(network)
    before = [(name, id(module), type(module)) for name, module in network.named_modules()]
    encoder = Encoder(Backbone(network, 64, (0.5,) * 3, (0.5,) * 3), **settings)
    EncoderPass(encoder.train())
    encoder(photos()).sum().backward() if settings else encoder(photos())
    assert encoder.network is network
    assert [(name, id(module), type(module)) for name, module in network.named_modules()] == before
    # Batch statistics have moved by now; the features must be those of the plain network with the same state.
    plain.load_state_dict(network.state_dict())
    assert torch.equal(encoder.eval()(photos()), cells(plain.eval()(photos())))


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
def test_the_scaled_weights_follow_every_change(change: Callable[[Encoder], None]) -> None:
    backbone = make_backbone("resnet18", "layer1")
    apart = copy_of(backbone).network
    encoder = Encoder(joined(backbone), trainable_from="all")
    before = encoder.eval()(photos())
    change(encoder)
    encoder.eval()
    features = encoder(photos())
    assert not torch.equal(features, before)
    torch.testing.assert_close(features, cells(_apart(encoder, apart)(photos())), **EXACT)


def _pickled(encoder: Encoder) -> Encoder:
    other: Encoder = pickle.loads(pickle.dumps(encoder))
    return other


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
@pytest.mark.parametrize("name", ["resnet18", "timm/tf_efficientnet_lite0"])
def test_a_copy_has_norms_of_its_own(name: str, duplicate: Callable[[Encoder], Encoder]) -> None:
    encoder = Encoder(joined(make_backbone(name))).eval()
    before = encoder(photos())
    other = duplicate(encoder)
    assert torch.equal(other(photos()), before)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.copy_(tensor * 0.9 + 0.1)
    assert torch.equal(encoder(photos()), before)
    changed = other(photos())
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(changed, cells(_apart(other, make_backbone(name).network)(photos())), **EXACT)


@pytest.mark.parametrize("name", ["resnet18", "timm/tf_efficientnet_lite0"])
def test_channels_last_reaches_the_joined_layers(name: str) -> None:
    encoder = Encoder(joined(make_backbone(name)))
    expected = encoder(photos())
    encoder.to(memory_format=torch.channels_last)
    normed = [module for module in encoder.modules() if isinstance(module, NormedConv2d)]
    assert normed
    assert all(module.weight.is_contiguous(memory_format=torch.channels_last) for module in normed)
    torch.testing.assert_close(encoder(photos()), expected, **EXACT)


@pytest.mark.parametrize("is_joined", [True, False])
def test_folding_leaves_parameters_that_are_shared_with_another_network(is_joined: bool) -> None:
    net = _Net(_plain).double().eval()
    other = _Net(_plain).double().eval()
    other.conv.weight, other.norm.weight = net.conv.weight, net.norm.weight
    expected, shared = other(photos()), other.conv.weight.clone()
    if is_joined:
        join_norms(net)
    fold_norms(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert torch.equal(other.conv.weight, shared)
    assert torch.equal(other(photos()), expected)


def test_outputs_of_convolutions_are_not_kept() -> None:
    """The input of the norm, an activation of this size, is what the two layers apart would keep more."""
    layers = OrderedDict(layer1=nn.Conv2d(3, 8, 3), bn1=nn.BatchNorm2d(8), relu=nn.ReLU(inplace=True))
    backbone = as_backbone(nn.Sequential(layers), 8)
    apart = copy_of(backbone).network
    encoder = Encoder(joined(backbone), trainable_from="all").train()
    activation = 8 * 2 * 8 * 62 * 62
    difference = saved_bytes(_apart(encoder, apart), photos()) - saved_bytes(encoder.network, photos())
    assert difference == pytest.approx(activation, rel=0.05)
