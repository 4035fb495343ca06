"""A fast encoder for many photos, without gradients. It fills the feature cache, where each photo is encoded once.

The plain form is `encoder.eval()(pixel_values)`. The features are the same up to rounding.
This module does the encoding. `capdist.features.compiling` decides when compiling the network is worth its time.

Shapes: B images, H and W pixels, N cells of the grid, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from capdist.errors import reason_of
from capdist.models.encoder import Encoder
from capdist.models.fast.norm_folding import fold_norms
from capdist.recipe.sections import EncoderSection

Precision = Literal["no", "bf16", "fp16"]
"""Number format of products, by accelerate's names; `no` keeps the format of the weights."""

_AUTOCAST: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


class EncoderPass:
    """A copy of an encoder in evaluation mode, with BatchNorm folded into the convolutions and channels last.

    The copy has the weights that the encoder has now. Make a new one after the encoder's weights have changed.

    Args:
        encoder: Is copied and not changed.
        precision: Number format in which the copy computes. Autocast in the calling code has no effect on it.
    """

    def __init__(self, encoder: Encoder, precision: Precision = "no") -> None:
        # Tensors made in inference mode are of another kind: for them the network would be compiled again.
        with torch.inference_mode(False), torch.no_grad():
            network = copy.deepcopy(encoder).requires_grad_(False).eval()
            fold_norms(network.network)
            self._network = network.to(memory_format=torch.channels_last)
        self._precision = precision
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._shape = torch.Size()

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Encode normalised photos (B, 3, H, W) to features (B, N, C)."""
        count, *shape = pixel_values.shape
        fits = self._compiled is not None and shape == [*self._shape[1:]] and count <= self._shape[0]
        with torch.inference_mode(False), torch.no_grad(), self._autocast(pixel_values.device.type):
            if self._compiled is None or not fits:
                return self._network(pixel_values)
            # For a smaller batch the network would be compiled again; filled up with blank photos, it fits.
            full = pixel_values.new_zeros(self._shape)
            full[:count] = pixel_values
            return self._compiled(full)[:count]

    def compile(self, pixel_values: Tensor) -> str | None:
        """Compile the network for photos of this size, in batches of B or fewer. This takes tens of seconds.

        Photos of other sizes and larger batches pass through the network as before. If compiling fails, all do:
        a machine may have no C++ compiler.

        Args:
            pixel_values: (B, 3, H, W).

        Returns:
            None, or why compiling failed, in one line.
        """
        self._shape = pixel_values.shape
        try:
            # Private API of torch. If it changes, the import or the patch fails, which is handled as any failure.
            from torch._inductor import config

            self._compiled = torch.compile(self._network, dynamic=False, fullgraph=True)
            # Freezing makes the weights constants, which the compiler lays out in advance. It reads the setting while
            # the first batch passes, in more places than `options` of `torch.compile` reach.
            with config.patch(freezing=True):
                self(pixel_values)
        except Exception as error:  # the compilers' errors have no common class
            self._compiled = None
            return f"{type(error).__name__}: {reason_of(error)}"
        return None

    def _autocast(self, device: str) -> torch.autocast:
        return torch.autocast(device, _AUTOCAST.get(self._precision), enabled=self._precision in _AUTOCAST)


def encoder_precision(encoder: EncoderSection, device: torch.device, mixed_precision: str) -> Precision:
    """Return the number format in which a frozen encoder computes.

    Args:
        encoder: The recipe's section; its `precision` is looked up.
        device: Where the encoder runs. `auto` asks whether it has units for bfloat16.
        mixed_precision: What accelerate uses for training. `inherit` takes it.
    """
    if encoder.precision == "auto":
        return "bf16" if has_fast_bfloat16(device) else "no"
    asked = mixed_precision if encoder.precision == "inherit" else encoder.precision
    return "bf16" if asked == "bf16" else "fp16" if asked == "fp16" else "no"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether a device has units for bfloat16. One without emulates it, many times slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 lacks it
    return any(capabilities.get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))
