"""What a training process does with memory that is freed: keep it for the next step, which needs as much again."""

from __future__ import annotations

import contextlib
import ctypes

import pyarrow as pa

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT = 512 * 1024 * 1024
MAPPED = 32 * 1024 * 1024
"""glibc allows no more."""


def keep_freed_memory() -> None:
    """Keep up to 512 MB of freed memory in this process; without glibc only what Arrow frees is kept.

    By default tensors of some MB are handed back to the system with every step, and Arrow's own pool hands back each
    row group: their pages are then cleared and mapped again, 5 to 13 % of the time of a step on a CPU.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED)
