"""BatchNorm with stored statistics as part of the convolution before it.

Such a BatchNorm scales and shifts each channel by fixed numbers. A convolution with other weights does both:
`γ (w∗x + b − μ) / √(σ² + ε) + β = (s·w)∗x + s·(b − μ) + β` with `s = γ / √(σ² + ε)`, as in `torch.nn.utils.fusion`.
The norm then costs no pass over the activations, and backward needs no copy of the convolution's output.

There are two ways to use this. `join_norms` is for a network that may train: it computes the scaled weights at every
pass and keeps both layers with their names and parameters. `fold_norms` is for a copy that only encodes: it scales the
weights once and drops the norms.

Neither changes a layer. Both put new layers in the places of old ones; the new ones hold the same parameters.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]
"""A convolution, and the BatchNorm that alone reads its output."""


def join_norms(network: nn.Module) -> None:
    """Let each convolution apply the BatchNorm behind it while that norm uses its stored statistics.

    Both layers of a pair are replaced in `network` by a `NormedConv2d` and an `AppliedNorm2d`. These keep names,
    parameters, buffers and gradients. A network without pairs, or joined before, does not change.

    Args:
        network: In evaluation mode. Its norms must not be replaced later, as by `SyncBatchNorm`.
    """
    joined: dict[nn.Module, nn.Module] = {}
    for convolution, norm in find_pairs(network):
        joined[norm] = applied = AppliedNorm2d(norm)
        joined[convolution] = NormedConv2d(convolution, applied)
    _replace(network, joined)
    # A network may also reach its layers through a list of its own, which still holds the old ones. The tracer
    # then meets a layer that has no name. Half of a pair would give wrong results: take all of it back.
    if joined and _trace(network) is None:
        _replace(network, {new: old for old, new in joined.items()})


@torch.no_grad()
def fold_norms(network: nn.Module) -> None:
    """Scale the weights of convolutions once and for all, and drop the norms behind them.

    Args:
        network: Must be in evaluation mode.
    """
    join_norms(network)
    rest: dict[nn.Module, nn.Module] = {}
    for convolution in network.modules():
        if isinstance(convolution, NormedConv2d):
            rest |= {norm: norm.rest() for norm in convolution.norms}
            convolution.fold()
    _replace(network, rest)


class NormedConv2d(nn.Conv2d):
    """A convolution that also applies the norm behind it, while that norm uses its stored statistics.

    It scales its weights at every pass. So there is no second copy that an optimizer step could leave outdated.
    `_conv_forward` is not public; torch keeps it for subclasses that compute with other weights, as its own do.

    Args:
        convolution: The one to stand in for; this one takes its parameters.
        norm: Stands in for the norm behind it.
    """

    def __init__(self, convolution: nn.Conv2d, norm: AppliedNorm2d) -> None:
        old: Any = convolution
        # Layers made on `meta` draw no random numbers: the rest of the model starts from the weights it always had.
        super().__init__(
            old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, old.groups,
            old.bias is not None, old.padding_mode, device="meta",
        )  # fmt: skip
        self.weight, self.bias = old.weight, old.bias
        # In a tuple, torch does not register the norm a second time, under a name below this layer.
        self.norms: tuple[AppliedNorm2d, ...] = (norm,)
        self.pads_as_timm = _is_timms(convolution, "Conv2dSame")
        self.training = old.training

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution's output (B, C, h, w), normalised if the norm uses stored statistics."""
        if self.pads_as_timm:
            input = _pad_same(self, input)
        weight, bias = self.weight, self.bias
        for norm in self.norms:
            if not norm.training:
                weight, bias = _scaled(self, norm)
        return self._conv_forward(input, weight, bias)

    def fold(self) -> None:
        """Take the scaled weights as its own and forget the norm."""
        for norm in self.norms:
            weight, bias = _scaled(self, norm)
            self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.norms = ()


class AppliedNorm2d(nn.BatchNorm2d):
    """A BatchNorm that leaves the stored statistics to the `NormedConv2d` before it.

    Args:
        norm: The one to stand in for; this one takes its parameters and buffers. In timm, a norm may hold a dropout
            and an activation too.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked, self.track_running_stats = norm.num_batches_tracked, norm.track_running_stats
        for name, child in norm.named_children():
            self.add_module(name, child)
        self.training = norm.training

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with batch statistics, or leave (B, C, h, w) as the convolution has normalised it."""
        output = super().forward(input) if self.training else input
        for child in self.children():
            output = child(output)
        return output

    def rest(self) -> nn.Module:
        """Return what remains once the convolution does the normalising: timm's dropout and activation."""
        return nn.Sequential(*self.children())


def _scaled(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the convolution that does both; gradients reach the parameters of both."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
    return convolution.weight * scale[:, None, None, None], torch.addcmul(norm.bias, shift, scale)


def _pad_same(convolution: nn.Conv2d, input: Tensor) -> Tensor:
    """Pad as timm's `Conv2dSame`, by widths that depend on the size of the input."""
    from timm.layers.padding import pad_same

    size, stride, dilation = convolution.kernel_size, convolution.stride, convolution.dilation
    return pad_same(input, [*size], [*stride], [*dilation])


def _replace(network: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others, wherever in the network they are."""
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module in replacements:
            network.set_submodule(name, replacements[module])


def find_pairs(network: nn.Module) -> list[Pair]:
    """Return the convolutions that have a BatchNorm right behind them.

    A pair must be certain from following a tensor through the network. Each of the two is called once, nothing else
    reads the convolution's output, and nothing reads their weights directly. A network that cannot be followed has no
    pairs.

    Args:
        network: Must be in evaluation mode.
    """
    graph = _trace(network)
    if graph is None:
        return []
    modules = dict(network.named_modules())
    called = [modules[str(node.target)] for node in graph.nodes if node.op == "call_module"]
    calls = Counter(inner for module in called for inner in module.modules())
    read = {modules.get(str(node.target).rpartition(".")[0]) for node in graph.nodes if node.op == "get_attr"}
    pairs = [(modules[first], modules[second]) for first, second in filter(None, map(_neighbours, graph.nodes))]
    return [
        (convolution, norm)
        for convolution, norm in pairs
        if _is_plain_convolution(convolution)
        and _is_plain_norm(norm)
        and calls[convolution] == calls[norm] == 1
        and not read & {convolution, norm}
    ]


def _trace(network: nn.Module) -> fx.Graph | None:
    """Return the calls that a photo passes through, or None if the network's code cannot be followed."""
    try:
        return _Tracer().trace(network)
    except Exception:  # a network's own code may raise anything when it meets a stand-in for a tensor
        return None


class _Tracer(fx.Tracer):
    """Looks into modules only as far as it must to meet every BatchNorm."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d) or not any(isinstance(inner, nn.BatchNorm2d) for inner in m.modules())


def _neighbours(node: fx.Node) -> tuple[str, str] | None:
    """Return the names of two modules if `node` calls the second with the output of the first, read only here."""
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
        return None
    return (str(source.target), str(node.target)) if len(source.users) == 1 else None


def _is_plain_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether the output is linear in the layer's own weight. Some kinds of timm normalise the weight first."""
    return (type(module) is nn.Conv2d or _is_timms(module, "Conv2dSame")) and not _has_hooks(module)


def _is_plain_norm(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Return whether this is a BatchNorm with stored statistics and with weights."""
    if not (type(module) is nn.BatchNorm2d or _is_timms(module, "BatchNormAct2d")) or _has_hooks(module):
        return False
    return module.weight is not None and module.running_mean is not None


def _is_timms(module: nn.Module, name: str) -> bool:
    """Return whether a module is of this class of timm, which need not be installed: if it is not loaded, none is."""
    layers = sys.modules.get("timm.layers")
    return type(module) is getattr(layers, name, None)


def _has_hooks(module: nn.Module) -> bool:
    """Return whether a hook sees what passes this layer, or makes its weight before each call (`spectral_norm`).

    Torch has no public way to ask. Should it rename these lists, the AttributeError says so.
    """
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )
