"""Backbones whose BatchNorm does something. Fresh ones divide by one and add nothing, which hides every mistake."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from capdist.models.encoder import Backbone, build_backbone
from capdist.models.fast.norm_folding import join_norms


def random_norms(network: nn.Module) -> None:
    """Give every BatchNorm statistics and weights of its own."""
    generator = torch.Generator().manual_seed(7)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.3, generator=generator)


def make_backbone(name: str, stage: str | None = None) -> Backbone:
    """Make a backbone in float64, with the layers of torchvision or timm."""
    torch.manual_seed(0)
    backbone = build_backbone(name, stage, joins_norms=False)
    random_norms(backbone.network)
    backbone.network.double()
    return backbone


def as_backbone(network: nn.Module, channels: int) -> Backbone:
    """Make a backbone of a given network, in float64."""
    random_norms(network)
    return Backbone(network.double(), channels, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def copy_of(backbone: Backbone) -> Backbone:
    """Return an equal backbone with weights of its own."""
    return copy.deepcopy(backbone)


def joined(backbone: Backbone) -> Backbone:
    """Join convolutions and norms in place, as `build_backbone` does for capdist's own networks."""
    join_norms(backbone.network.eval())
    return backbone


def photos(count: int = 2, side: int = 64) -> Tensor:
    """Return normalised photos in float64."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def cells(feature_map: Tensor) -> Tensor:
    """Return (B, N, C) of a feature map (B, C, h, w)."""
    return feature_map.flatten(2).transpose(1, 2)


def saved_bytes(module: nn.Module, inputs: Tensor) -> int:
    """Return the size of what is kept for the backward pass, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(inputs)
    del output
    return sum(kept.values())
