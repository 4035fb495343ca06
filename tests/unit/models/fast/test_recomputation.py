"""Gradient checkpointing keeps less for the same gradients, statistics and dropout. Some networks cannot do it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from capdist.errors import UsageError
from capdist.models.encoder import Backbone, Encoder
from capdist.recipe.sections import Recipe
from tests.unit.models.backbones import as_backbone, copy_of, joined, make_backbone, photos, saved_bytes


def _pair(backbone: Backbone, **settings: Any) -> tuple[Encoder, Encoder]:
    """Return an encoder, and an equal one that recomputes."""
    other = copy_of(backbone)
    return Encoder(backbone, **settings).train(), Encoder(other, gradient_checkpointing=True, **settings).train()


def _assert_alike(plain: Encoder, recomputing: Encoder) -> None:
    for encoder in (plain, recomputing):
        torch.manual_seed(5)
        for _ in range(2):  # the second pass starts from the statistics that the first has left
            features = encoder(photos(3, 32))
            (features * torch.linspace(0, 1, features.numel(), dtype=torch.float64).view_as(features)).sum().backward()
    for (name, ours), theirs in zip(recomputing.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9 * float(theirs.grad.abs().max()))
    for (name, ours), theirs in zip(recomputing.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert [type(m) for m in recomputing.modules()] == [type(m) for m in plain.modules()]
    norms = [m for m in recomputing.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.momentum == 0.1 and norm.num_batches_tracked is not None for norm in norms)


@pytest.mark.parametrize(
    ("name", "trainable_from", "batch_norm"),
    [
        ("resnet18", "layer4", "frozen"),
        ("resnet18", "layer3", "train"),
        ("resnet18", "all", "train"),
        ("timm/resnet10t", "layer3", "frozen"),
        ("timm/test_efficientnet", "blocks.2", "frozen"),
        ("timm/test_efficientnet", "all", "frozen"),
    ],
)
@pytest.mark.parametrize("prepare", [joined, lambda backbone: backbone], ids=["joined", "plain"])
def test_gradients_and_statistics_are_the_same(
    prepare: Callable[[Backbone], Backbone], name: str, trainable_from: str, batch_norm: Any
) -> None:
    plain, recomputing = _pair(prepare(make_backbone(name)), trainable_from=trainable_from, batch_norm=batch_norm)
    _assert_alike(plain, recomputing)


def test_dropout_falls_as_it_did() -> None:
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 8, 1), nn.ReLU())
    backbone = as_backbone(nn.Sequential(OrderedDict(layer1=nn.Sequential(block))), 8)
    _assert_alike(*_pair(joined(backbone), trainable_from="all", batch_norm="train"))


@pytest.mark.parametrize(("name", "share"), [("resnet18", 0.5), ("timm/resnet10t", 0.8)])
def test_less_is_kept(name: str, share: float) -> None:
    """Many small activations beside few weights: with large weights, their scaled copies would hide them."""
    plain, recomputing = _pair(joined(make_backbone(name)), trainable_from="layer1")
    assert saved_bytes(recomputing, photos(4, 128)) < share * saved_bytes(plain, photos(4, 128))


def test_only_blocks_that_train_run_twice() -> None:
    encoder = Encoder(joined(make_backbone("resnet18")), trainable_from="layer3", gradient_checkpointing=True).train()
    runs: Counter[str] = Counter()
    for name in ("conv1", "layer2.0", "layer3.0", "layer4.1"):
        module = encoder.network.get_submodule(name)
        module.register_forward_pre_hook(lambda module, inputs, name=name: runs.update([name]))
    encoder(photos()).sum().backward()
    assert runs == {"conv1": 1, "layer2.0": 1, "layer3.0": 2, "layer4.1": 2}
    for mode in (torch.no_grad, torch.inference_mode):
        runs.clear()
        with mode():
            encoder(photos())
        assert set(runs.values()) == {1}


def test_timms_own_switch_is_left_off() -> None:
    encoder = Encoder(make_backbone("timm/resnet10t"), trainable_from="all", gradient_checkpointing=True)
    seen = []
    encoder.network.layer4[0].register_forward_pre_hook(lambda *_: seen.append(encoder.network.grad_checkpointing))
    encoder(photos())
    assert seen == [True]
    with pytest.raises(RuntimeError, match="channels"):
        encoder(torch.zeros(1, 5, 64, 64, dtype=torch.float64))
    assert encoder.network.grad_checkpointing is False


class _Opaque(nn.Conv2d):
    """A network in one piece."""


class _Refusing(nn.Conv2d):
    """As those of timm's that have the method and cannot."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"


@pytest.mark.parametrize("network", [_Opaque(3, 8, 3), _Refusing(3, 8, 3)])
def test_network_that_cannot_is_a_usage_error(network: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"encoder\.gradient_checkpointing") as caught:
        Encoder(as_backbone(network, 8), trainable_from="all", gradient_checkpointing=True)
    assert type(network).__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("encoder", "fragment"),
    [({}, "is frozen"), ({"name": "timm/resnet18", "batch_norm": "train", "trainable_from": "layer3"}, "batch_norm")],
)
def test_recipes_in_which_it_makes_no_sense(encoder: dict[str, Any], fragment: str) -> None:
    Recipe(encoder=encoder)
    with pytest.raises(UsageError, match=r"encoder\.gradient_checkpointing") as caught:
        Recipe(encoder=encoder | {"gradient_checkpointing": True})
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "encoder", [{"batch_norm": "train"}, {"batch_norm": "frozen"}, {"name": "timm/resnet18", "batch_norm": "frozen"}]
)
def test_recipes_in_which_it_does(encoder: dict[str, Any]) -> None:
    recipe = Recipe(encoder=encoder | {"gradient_checkpointing": True, "trainable_from": "layer3"})
    assert recipe.encoder.gradient_checkpointing
