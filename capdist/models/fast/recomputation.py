"""Gradient checkpointing: activations are computed again in the backward pass instead of being kept.

Chen et al., Training Deep Nets with Sublinear Memory Cost (2016). It saves memory and costs a second forward pass
through the blocks that train. The plain form is `network(values)`. Values, gradients, dropout and the statistics of
BatchNorm are the same, with one exception: networks of timm recompute with their own code, which would count a batch
twice in statistics that train. A recipe cannot ask for that.

Nothing here is private API of torch. `set_reentrant_ckpt` is missing in some versions of timm, so `check_recomputable`
tries it before training starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from capdist.errors import UsageError

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def check_recomputable(network: nn.Module) -> None:
    """Refuse a network that `run_recomputing` cannot run.

    Raises:
        UsageError: if the network is neither a plain `nn.Sequential` nor one of timm's that can recompute.
    """
    if type(network) is nn.Sequential:
        return
    try:
        from timm.layers import config

        # With torch's reentrant kind, a block whose input needs no gradient would silently not train.
        config.set_reentrant_ckpt(False)
        _switch_timm(network, True)
        _switch_timm(network, False)
    except (ImportError, AttributeError, AssertionError):
        raise UsageError(
            f"encoder.gradient_checkpointing: timm's {type(network).__name__} cannot, or needs a newer timm; "
            "drop this key"
        ) from None


def run_recomputing(network: nn.Module, values: Tensor) -> Tensor:
    """Run a network and keep only the input of each block that trains, and nothing of the other blocks.

    Args:
        network: One of timm's, or an `nn.Sequential` of layers and stages as `build_backbone` makes it from a ResNet.
            A stage is itself an `nn.Sequential`, and its children are the blocks.
        values: (B, 3, H, W).

    Returns:
        What the network returns.
    """
    if type(network) is nn.Sequential:
        for stage in network:
            if type(stage) is nn.Sequential:
                for block in stage:
                    values = _recompute(block, values)
            else:
                values = stage(values)
        return values
    _switch_timm(network, True)
    try:
        output: Tensor = network(values)
        return output
    finally:
        _switch_timm(network, False)


def _switch_timm(network: Any, enabled: bool) -> None:
    network.set_grad_checkpointing(enabled)


def _recompute(block: nn.Module, values: Tensor) -> Tensor:
    # One context is for the first run and one for the second. The first run must count the batch as usual.
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(block)

    output: Tensor = checkpoint(block, values, use_reentrant=False, context_fn=contexts)
    return output


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Keep the statistics of BatchNorm as they are, since the first run has counted this batch."""
    norms = [module for module in block.modules() if isinstance(module, _NORMS) and module.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # With momentum 0, the running mean and variance keep their values. Without a counter, none is raised.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
