"""Decides when to compile the encoder. Compiling takes tens of seconds, so enough photos must remain to gain more."""

from __future__ import annotations

import logging
import time

from torch import Tensor

from capdist.features.encoder_pass import EncoderPass

logger = logging.getLogger(__name__)

WORTH_IT_S = 900.0
"""Seconds of encoding that must remain for `auto` to compile. `docs/performance.md` says what compiling gains."""


class CompilingEncoder:
    """An encoder pass that compiles its network when that is worth it, and logs the speed before and after.

    Args:
        encoder: The pass, not yet compiled.
        mode: The recipe's `encoder.compile`: `auto` compiles if much time of encoding remains, `on` compiles with the
            first batch, `off` never compiles.
    """

    def __init__(self, encoder: EncoderPass, mode: str) -> None:
        self.encoder, self.mode = encoder, mode
        self._called_s: float | None = None
        self._per_photo_s: list[float] = []  # from call to call, so with reading photos and storing features
        self._before_s: float | None = None

    def __call__(self, pixel_values: Tensor, remaining: int) -> Tensor:
        """Encode normalised photos (B, 3, H, W) to features (B, N, C).

        Args:
            pixel_values: A batch. All batches of a split have the same size, except the last.
            remaining: Number of photos that this process still has to encode, including these.
        """
        now = time.perf_counter()
        if self._called_s is not None:
            self._per_photo_s.append((now - self._called_s) / len(pixel_values))
        if self._is_worth_it(remaining):
            self._compile(pixel_values)
        elif self._before_s is not None and len(self._per_photo_s) == 2:
            after_s = self._per_photo_s[1]
            logger.info(f"encoder compiled: {1 / self._before_s:.1f} photos/s before, {1 / after_s:.1f} since")
            self._before_s = None
        self._called_s = time.perf_counter()
        return self.encoder(pixel_values)

    def _is_worth_it(self, remaining: int) -> bool:
        if self.mode == "auto" and len(self._per_photo_s) >= 2:  # the first one includes the warm-up
            return remaining * self._per_photo_s[-1] > WORTH_IT_S
        return self.mode == "on"

    def _compile(self, pixel_values: Tensor) -> None:
        self.mode = "off"
        started_s = time.perf_counter()
        problem = self.encoder.compile(pixel_values)
        if problem is not None:
            logger.warning(f"encoder.compile: not possible here, going on without ({problem})")
            return
        logger.info(f"encoder compiled in {time.perf_counter() - started_s:.0f} s")
        self._before_s = self._per_photo_s[-1] if self._per_photo_s else None
        self._per_photo_s.clear()
