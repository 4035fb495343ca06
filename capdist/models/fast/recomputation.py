"""Activations that are computed a second time in the backward pass instead of being kept (Chen et al., 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from capdist.errors import UsageError


def check_recomputable(network: nn.Module) -> None:
    """Refuse a network that `run_recomputing` could not run.

    Raises:
        UsageError: naming the key to drop.
    """
    if type(network) is nn.Sequential:
        return
    try:
        from timm.layers import config

        # With the other kind, blocks whose input needs no gradient would silently not train.
        config.set_reentrant_ckpt(False)
        _switch_timm(network, True)
        _switch_timm(network, False)
    except (ImportError, AttributeError, AssertionError):
        raise UsageError(
            f"encoder.gradient_checkpointing: timm's {type(network).__name__} cannot, or needs a newer timm; "
            "drop this key"
        ) from None


def run_recomputing(network: nn.Module, values: Tensor) -> Tensor:
    """Run a network, keeping of each of its blocks only what goes into it, and nothing of one that does not train.

    Args:
        network: One of timm's, or the blocks are the children of children that are `nn.Sequential`, as in
            torchvision's ResNets.
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
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(block)

    output: Tensor = checkpoint(block, values, use_reentrant=False, context_fn=contexts)
    return output


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Let no BatchNorm count the batch a second time."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
