"""BatchNorm with stored statistics as part of the convolution before it.

Such a BatchNorm is a fixed scale and shift of each channel, which the convolution can do by itself:
`γ (w∗x + b − μ) / √(σ² + ε) + β = (s·w)∗x + s·(b − μ) + β` with `s = γ / √(σ² + ε)`, as in `torch.nn.utils.fusion`. It
then costs no pass over the activations, and the convolution's output is not kept for the backward pass.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

Pair = tuple[str, str]
"""Names of a convolution, and of the BatchNorm that is the only reader of its output."""


class _NormedConv2d(nn.Conv2d):
    """Also applies the norm behind it, while that uses its stored statistics.

    The weights are scaled at every pass: there is no copy that could be older than they are.
    """

    norm: tuple[nn.BatchNorm2d]  # in a tuple, so that it is registered under its own name only

    def forward(self, input: Tensor) -> Tensor:
        (norm,) = self.norm
        if norm.training:
            return super().forward(input)
        return self._conv_forward(self._padded(input), *_folded(self, norm))

    def _padded(self, input: Tensor) -> Tensor:
        return input


class _AppliedNorm2d(nn.BatchNorm2d):
    """Leaves to a `_NormedConv2d` what that does."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            return super().forward(input)
        for part in _besides(self):
            input = part(input)
        return input


@cache
def _joined(kind: type) -> Any:
    """Return the class that a convolution or norm of a class has once it is joined."""
    joined = _NormedConv2d if issubclass(kind, nn.Conv2d) else _AppliedNorm2d
    if kind in joined.__bases__:
        return joined
    # The paddings of timm's Conv2dSame depend on the size of its input.
    own = {"_padded": _padded_same} if kind in _timm_layers("Conv2dSame") else {}
    return type(f"{joined.__name__}_{kind.__name__}", (joined, kind), own)


def _padded_same(convolution: nn.Conv2d, input: Tensor) -> Tensor:
    from timm.layers.padding import pad_same

    size, stride, dilation = convolution.kernel_size, convolution.stride, convolution.dilation
    return pad_same(input, [*size], [*stride], [*dilation])


def _besides(norm: nn.Module) -> list[nn.Module]:
    """Return what timm's norms do besides."""
    return [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]


def find_pairs(network: nn.Module) -> list[Pair]:
    """Return the convolutions that have a BatchNorm right behind them.

    Only what is certain from following a tensor through the network: both are called once, nothing else reads the
    convolution's output, and nothing reads their weights directly. A network that cannot be followed has no pairs.

    Args:
        network: In evaluation mode.
    """
    try:
        graph = _Tracer().trace(network)
    except Exception:  # whatever a network's own code raises when it meets a stand-in for a tensor
        return []
    modules = dict(network.named_modules())
    called = [modules[str(node.target)] for node in graph.nodes if node.op == "call_module"]
    calls = Counter(id(inner) for module in called for inner in module.modules())
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs = [_pair_at(node) for node in graph.nodes]
    return [
        (convolution, norm)
        for convolution, norm in filter(None, pairs)
        if _is_convolution(modules[convolution])
        and _is_stored_norm(modules[norm])
        and calls[id(modules[convolution])] == calls[id(modules[norm])] == 1
        and not read & {convolution, norm}
    ]


class _Tracer(fx.Tracer):
    """Looks into modules only as far as is needed to meet every BatchNorm."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or not any(isinstance(inner, _BatchNorm) for inner in m.modules())


def _pair_at(node: fx.Node) -> Pair | None:
    """Return the names of a module and of the only one that it hands its output to, if `node` is the latter."""
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
        return None
    return (str(source.target), str(node.target)) if len(source.users) == 1 else None


def _is_convolution(module: nn.Module) -> bool:
    """Whether the output is linear in the module's own weight: some of timm's kinds normalise the weight first."""
    return isinstance(module, _NormedConv2d) or type(module) in (nn.Conv2d, *_timm_layers("Conv2dSame"))


def _is_stored_norm(module: nn.Module) -> bool:
    if not isinstance(module, _AppliedNorm2d) and type(module) not in (nn.BatchNorm2d, *_timm_layers("BatchNormAct2d")):
        return False
    return module.weight is not None and module.running_mean is not None


def _timm_layers(name: str) -> list[type]:
    """Return timm's class of that name; a network of timm's can only be there if timm has been imported."""
    layers = sys.modules.get("timm.layers")
    return [getattr(layers, name)] if hasattr(layers, name) else []


def join(network: nn.Module, pairs: Iterable[Pair]) -> None:
    """Let convolutions apply the norms behind them, with the weights of the moment, while these use stored statistics.

    Names, parameters and gradients stay as they are. A norm must not be replaced by another module afterwards.

    Args:
        network: Changed in place; joined ones may be joined again.
        pairs: Of `find_pairs`.
    """
    for convolution, norm in _modules(network, pairs):
        if not isinstance(convolution, _NormedConv2d):
            for module in (convolution, norm):
                kind: Any = type(module)
                module.__class__ = _joined(kind)
            convolution.__dict__["norm"] = (norm,)


@torch.no_grad()
def fold(network: nn.Module, pairs: Iterable[Pair]) -> None:
    """Scale the weights of convolutions for good, and drop the norms behind them.

    Args:
        network: In evaluation mode; changed in place.
        pairs: Of `find_pairs`.
    """
    for (_, name), (convolution, norm) in zip(pairs, _modules(network, pairs), strict=True):
        weight, bias = _folded(convolution, norm)
        if isinstance(convolution, _NormedConv2d):
            del convolution.norm
            convolution.__class__ = type(convolution).__bases__[-1]
        convolution.weight, convolution.bias = nn.Parameter(weight), nn.Parameter(bias)
        rest = _besides(norm)
        network.set_submodule(name, nn.Sequential(*rest) if rest else nn.Identity())


def _modules(network: nn.Module, pairs: Iterable[Pair]) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    return [(network.get_submodule(conv), network.get_submodule(norm)) for conv, norm in pairs]  # type: ignore[misc]


def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the convolution that does both, differentiable in the weights of both."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
    return convolution.weight * scale[:, None, None, None], torch.addcmul(norm.bias, shift, scale)
