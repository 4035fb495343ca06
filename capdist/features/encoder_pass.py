"""The encoder as a plain function of photos: many of them, fast, without gradients.

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
"""Precision of matrix products, by accelerate's names; `no` is the precision of the weights."""

_AUTOCAST: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


class EncoderPass:
    """A copy of an encoder in evaluation mode, made fast: BatchNorm folded into convolutions, channels last.

    The copy does not follow later changes of the weights; make a new one when they have changed.

    Args:
        encoder: Encoder to copy; it is not changed.
        precision: Sets the copy's arithmetic, also where the caller uses another autocast.
    """

    def __init__(self, encoder: Encoder, precision: Precision = "no") -> None:
        # Tensors made in inference mode are of another kind and would need another compilation later.
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
            # A smaller batch would need another compilation, so it is filled up.
            full = pixel_values.new_zeros(self._shape)
            full[:count] = pixel_values
            return self._compiled(full)[:count]

    def compile(self, pixel_values: Tensor) -> str | None:
        """Compile for batches of this size or less, which takes tens of seconds; larger batches are not compiled.

        Args:
            pixel_values: (B, 3, H, W), a batch of the size.

        Returns:
            None, or in one line why it failed, for example without a compiler. Then the network that is not compiled
            goes on.
        """
        self._shape = pixel_values.shape
        try:
            from torch._inductor import config

            self._compiled = torch.compile(self._network, dynamic=False, fullgraph=True)
            # Torch reads this setting during the first batch, in more places than `options` of `torch.compile` reach.
            with config.patch(freezing=True):
                self(pixel_values)
        except Exception as error:  # the compilers' errors have no common class
            self._compiled = None
            return f"{type(error).__name__}: {reason_of(error)}"
        return None

    def _autocast(self, device: str) -> torch.autocast:
        return torch.autocast(device, _AUTOCAST.get(self._precision), enabled=self._precision in _AUTOCAST)


def encoder_precision(encoder: EncoderSection, device: torch.device, mixed_precision: str) -> Precision:
    """Return the arithmetic of a frozen encoder's pass.

    Args:
        encoder: Gives `precision`, the recipe's choice.
        device: Where the encoder runs.
        mixed_precision: Precision that training uses, after the launcher's settings.
    """
    if encoder.precision == "auto":
        return "bf16" if has_fast_bfloat16(device) else "no"
    asked = mixed_precision if encoder.precision == "inherit" else encoder.precision
    return "bf16" if asked == "bf16" else "fp16" if asked == "fp16" else "no"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether a processor has units for bfloat16; without them it is many times slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 cannot tell
    return any(capabilities.get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))
