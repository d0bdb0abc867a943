"""Memory that one step frees is the next step's, and does not go back to the system in between."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees, unless the environment (MALLOC_…, GLIBC_TUNABLES) has its own wishes.

    By default a large tensor is mapped when made and unmapped when freed, and the system clears each of its pages anew
    at every step: up to a twentieth of a step's time. The peak stays as it is, since a step needs all of it. It holds
    for the rest of the process, so a command does it and no library function.
    """
    told = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or told:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)  # never
        mallopt(MMAP_MAX, 0)
