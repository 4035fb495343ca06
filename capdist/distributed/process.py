"""Settings of processor and memory for this process, where the defaults make training slow."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def spin_briefly() -> None:
    """Let threads that wait for each other soon sleep instead of spinning for milliseconds.

    Must be called before torch is loaded. On a quiet machine it costs a few percent; on one that also does other
    work, steps are much faster.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step instead of handing it back to the system.

    Each step allocates and frees the same hundreds of megabytes. The system clears new memory page by page at the first
    access, which takes longer than the arithmetic of some layers. With glibc, blocks above 32 MB are always new memory.
    With other C libraries this function does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
