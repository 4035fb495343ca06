"""Encoders: a photo to a grid of features.

Shapes: B images, H and W pixels, N cells of the grid, C channels.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capdist.console import shows_bars
from capdist.errors import CheckpointError, StorageError, UsageError, nearest, nearest_name, reason_of
from capdist.models.fast.norm_folding import join_norms
from capdist.models.fast.recomputation import check_recomputable, run_recomputing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Backbone:
    """A network with a feature map, and the photos it was made for.

    Attributes:
        network: (B, 3, H, W) to (B, C, h, w).
        channels: C, which counts the numbers that describe a cell.
        mean: Of each colour in 0…1, subtracted before the network.
        std: Of each colour in 0…1, divided by before the network.
    """

    network: nn.Module
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Encoder(nn.Module):
    """Feature grid of a backbone.

    An encoder sets which parameters of the network train and whether its layers are in training mode. It replaces no
    layer: a network of your own keeps all its modules. `build_backbone` says what capdist does to its own networks.

    Args:
        backbone: Makes the feature map.
        grid: Cells a side of the feature grid, to which a map of another size is average-pooled. None keeps the map.
            A grid that is a multiple of the map only repeats its cells; each cell is then given once, see `repeats`.
        trainable_from: First block that trains, `all`, or None for a frozen encoder.
        batch_norm: Whether blocks that train use stored (`frozen`) or batch (`train`) statistics. Blocks that do
            not train always use the stored ones.
        gradient_checkpointing: Recompute the activations of blocks that train in the backward pass.

    Raises:
        UsageError: if no block has the name `trainable_from`, or the network cannot recompute.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        grid: int | None = None,
        trainable_from: str | None = None,
        batch_norm: Literal["frozen", "train"] = "frozen",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.network = backbone.network
        self.channels, self.mean, self.std = backbone.channels, backbone.mean, backbone.std
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            check_recomputable(self.network)
        self.grid = grid
        self.batch_norm = batch_norm
        self._trainable = _trainable_modules(self.network, trainable_from)
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        for module in self._trainable:
            module.requires_grad_(True)
        self.train(self.training)

    @property
    def is_frozen(self) -> bool:
        """Whether no parameter trains."""
        return not self._trainable

    def train(self, mode: bool = True) -> Encoder:
        """Switch to training mode, leaving frozen blocks and frozen BatchNorm in evaluation mode."""
        super().train(mode)
        if hasattr(self, "_trainable"):
            self.network.train(False)
            for module in self._trainable:
                module.train(mode)
            if self.batch_norm == "frozen":
                for module in self.network.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.train(False)
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode normalised photos.

        Args:
            pixel_values: (B, 3, H, W), normalised with `mean` and `std`.

        Returns:
            Features (B, N, C), cells row by row.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            feature_map = self._run(pixel_values)
            # A grid that is a multiple of the map has the map's own cells, each several times: see `repeats`.
            if self.grid is not None and any(self.grid % side for side in feature_map.shape[2:]):
                feature_map = F.adaptive_avg_pool2d(feature_map, self.grid)
            return feature_map.flatten(2).transpose(1, 2).contiguous()

    def repeats(self, num_cells: int) -> int:
        """Return for how many cells of the grid each cell from `forward` counts.

        Show, Attend and Tell attends to a 14x14 grid. A 224-pixel photo gives a 7x7 map, and pooling it to 14x14
        copies each cell into a block of 2x2. The four copies have the same features, so they get the same score, and
        each gets a quarter of the attention that their cell would get. The weighted sum of the 196 copies is then the
        weighted sum of the 49 cells. So `forward` gives the 49 cells, and nothing is computed four times.

        Only code that needs the attention of a single copy must know that a cell counts for four of them. An example
        is the doubly stochastic penalty, a sum over all 196 cells.

        Args:
            num_cells: N of the features that `forward` gave, 49 in the example.

        Returns:
            4 in the example; 1 if the grid is the map, or was pooled from it.
        """
        return 1 if self.grid is None else self.grid**2 // num_cells

    def _run(self, pixel_values: Tensor) -> Tensor:
        recomputes = self.gradient_checkpointing and torch.is_grad_enabled()
        feature_map: Tensor = run_recomputing(self.network, pixel_values) if recomputes else self.network(pixel_values)
        return feature_map


def _trainable_modules(network: nn.Module, trainable_from: str | None) -> list[nn.Module]:
    blocks = list(_blocks(network))
    if trainable_from is None:
        return []
    if trainable_from == "all":
        return [module for _, module in blocks]
    names = [name for name, _ in blocks]
    if trainable_from not in names:
        raise UsageError(
            f"encoder.trainable_from: the encoder has no block {trainable_from!r}"
            f"{nearest(trainable_from, ['all', *names])}"
        )
    return [module for _, module in blocks[names.index(trainable_from) :]]


def _blocks(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield named blocks in the order in which a photo passes them; a block of blocks yields its parts."""
    for name, child in network.named_children():
        if type(child) is nn.Sequential and not name.startswith("layer"):
            yield from ((f"{name}.{inner}", block) for inner, block in child.named_children())
        elif next(child.parameters(), None) is not None:
            yield name, child


def build_backbone(
    name: str, last_block: str | None = None, weights: str = "none", *, joins_norms: bool = True
) -> Backbone:
    """Make a backbone by name.

    Args:
        name: A torchvision ResNet, or `timm/<name>` with the `timm` extra.
        last_block: Last block to use; None = all but the classification layers.
        weights: `none`, `DEFAULT`, a torchvision weights name, or a local `.pth` or `.safetensors` file.
        joins_norms: Replace each convolution that a BatchNorm follows by one that applies the norm too, as
            `capdist.models.fast.norm_folding.join_norms` does. This saves time and memory and keeps names, parameters
            and results. False leaves the layers that torchvision or timm made.

    Raises:
        UsageError: for an unknown name, block or weights name, or a missing `timm` extra.
        CheckpointError: for a weights file that does not fit.
        StorageError: if weights must be downloaded and cannot be.
    """
    if name.startswith("timm/"):
        backbone = _timm_backbone(name.removeprefix("timm/"), last_block, weights)
    else:
        backbone = _torchvision_backbone(name, last_block, weights)
    if joins_norms:
        join_norms(backbone.network.eval())
    return backbone


def _torchvision_backbone(name: str, last_block: str | None, weights: str) -> Backbone:
    from torchvision import models

    known = [n for n in models.list_models(module=models) if n.startswith(("resnet", "resnext", "wide_resnet"))]
    if name not in known:
        raise UsageError(
            f"encoder.name: {name!r} is not a torchvision ResNet{nearest(name, known)}; with the timm extra, "
            "timm/<name> is any of its backbones with a feature map"
        )
    full: Any = models.get_model(name, weights=None)
    _load_weights(full, weights, lambda: _torchvision_weights(name, weights), ignore=("fc.",))
    children = OrderedDict((n, child) for n, child in full.named_children() if n not in ("avgpool", "fc"))
    if last_block is not None:
        blocks = [n for n in children if n.startswith("layer")]
        if last_block not in blocks:
            raise UsageError(f"encoder.last_block: {name} has no block {last_block!r}{nearest(last_block, blocks)}")
        names = list(children)
        children = OrderedDict((n, children[n]) for n in names[: names.index(last_block) + 1])
    network = nn.Sequential(children)
    return Backbone(network, _count_channels(network), IMAGENET_MEAN, IMAGENET_STD)


def _torchvision_weights(name: str, weights: str) -> dict[str, Tensor]:
    from torchvision import models

    known = models.get_model_weights(name)
    if weights not in known.__members__:
        choices = ["DEFAULT", "none", *known.__members__]
        raise UsageError(
            f"encoder.weights: {weights!r} is neither a file nor known for {name}{nearest(weights, choices)}"
        )
    state: dict[str, Tensor] = known[weights].get_state_dict(progress=shows_bars(), check_hash=True, weights_only=True)
    return state


def _timm_backbone(name: str, last_block: str | None, weights: str) -> Backbone:
    try:
        import timm
    except ImportError:
        raise UsageError(f"encoder.name: timm/{name} needs the timm extra; pip install 'capdist[timm]'") from None
    if not timm.is_model(name.partition(".")[0]):
        # timm's own list is long: show near names only.
        raise UsageError(f"encoder.name: timm has no model {name!r}{_near_timm_name(name)}")
    try:
        network: Any = timm.create_model(name, pretrained=False, num_classes=0, global_pool="")
    except RuntimeError as error:  # an unknown tag behind the dot
        raise UsageError(f"encoder.name: timm/{name}: {reason_of(error)}") from None
    config = network.pretrained_cfg
    heads = config.get("classifier") or "classifier"
    ignore = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    _load_weights(network, weights, lambda: _timm_weights(name, weights), ignore)
    if last_block is not None:
        _cut(network, last_block)
    channels = _count_channels(network)
    return Backbone(network, channels, tuple(config["mean"]), tuple(config["std"]))


def _cut(network: nn.Module, last_block: str) -> None:
    """Let a photo pass unchanged through the blocks behind the last one."""
    names = [name for name, _ in _blocks(network)]
    if last_block not in names:
        raise UsageError(f"encoder.last_block: the encoder has no block {last_block!r}{nearest(last_block, names)}")
    for name in names[names.index(last_block) + 1 :]:
        network.set_submodule(name, nn.Identity())


def _near_timm_name(name: str) -> str:
    import timm

    closest = nearest_name(name, timm.list_models())
    return "; see timm.list_models()" if closest is None else f"; did you mean '{closest}'?"


def _timm_weights(name: str, weights: str) -> dict[str, Tensor]:
    import timm

    if weights != "DEFAULT":
        raise UsageError(
            f"encoder.weights: {weights!r} is neither a file, DEFAULT nor none; in timm the name of the weights is "
            "part of the model's name"
        )
    state: dict[str, Tensor] = timm.create_model(name, pretrained=True, num_classes=0, global_pool="").state_dict()
    return state


@torch.no_grad()
def _count_channels(network: nn.Module) -> int:
    """Run a blank photo through the network: the only question that every backbone answers the same way."""
    try:
        feature_map = network.eval()(torch.zeros(1, 3, 64, 64))
        shape: Any = tuple(feature_map.shape)
    except (AssertionError, RuntimeError, ValueError) as error:
        feature_map, shape = None, f"an error ({reason_of(error)})"
    if feature_map is None or feature_map.ndim != 4 or feature_map.shape[1] < feature_map.shape[-1]:
        raise UsageError(
            f"encoder.name: gives {shape} for a 64-pixel photo instead of a feature map "
            "(1, channels, h, w); choose a convolutional backbone"
        )
    return int(feature_map.shape[1])


def _load_weights(
    network: nn.Module, weights: str, fetch: Callable[[], dict[str, Tensor]], ignore: tuple[str, ...]
) -> None:
    if weights == "none":
        return
    path = Path(os.path.expanduser(weights))
    if path.suffix in (".pth", ".pt", ".safetensors") or path.exists():
        _load_state(network, read_state_dict(path), weights, ignore)
        return
    try:
        state = fetch()
    except UsageError:
        raise
    except Exception as error:  # the libraries' errors for "no network" have no common class
        raise StorageError(
            f"encoder.weights: {weights} could not be downloaded ({type(error).__name__}: {reason_of(error)}); "
            "fetch the file on a machine with a network and give its path, or use encoder.weights=none"
        ) from error
    _load_state(network, state, weights, ignore)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a `.safetensors` file, or from a `.pth` file without running anything in it.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is not a state dict.
    """
    if not path.is_file():
        raise UsageError(f"encoder.weights: {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise classes of their own for damaged files
        raise CheckpointError(f"{path}: not a state dict of tensors ({reason_of(error)})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(
            f"{path}: not a state dict of tensors; save one with torch.save(model.state_dict(), path)"
        )
    return state


def _load_state(network: nn.Module, state: dict[str, Tensor], origin: str, ignore: tuple[str, ...]) -> None:
    expected = network.state_dict()
    # Files from before torch 0.4.1 lack this counter, which nothing here reads.
    needed = {k for k in expected if not k.startswith(ignore) and not k.endswith("num_batches_tracked")}
    missing = sorted(needed - state.keys())
    foreign = sorted(k for k in state.keys() - expected.keys() if not k.startswith(ignore))
    if missing or foreign:
        raise CheckpointError(
            f"{origin}: is not for this encoder: {len(missing)} tensors missing "
            f"(e.g. {', '.join(missing[:2]) or '-'}), {len(foreign)} unknown "
            f"(e.g. {', '.join(foreign[:2]) or '-'}); check encoder.name"
        )
    wrong = [k for k in sorted(needed) if expected[k].shape != state[k].shape]
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"{origin}: {key} is {tuple(state[key].shape)}, this encoder has {tuple(expected[key].shape)}; "
            "check encoder.name"
        )
    network.load_state_dict(
        {k: v for k, v in state.items() if k in expected and not k.startswith(ignore)}, strict=False
    )
