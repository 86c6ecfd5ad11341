"""How memory on the CPU is given back: not at all, as long as the command runs.

By default the C library returns every large block to the system when it is freed, and the system hands out the next one
page by page, each a fault and a page of zeros. What that costs depends on the size of the blocks: with the default token
budget next to nothing, with twice as large a budget in training a seventh of the time and two thirds of the time spent in
the system. The price is a peak that may be a tenth higher (`tests/benchmarks/speed.py --ablate`).
"""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Numbers of glibc's malloc.h."""


def keep_freed_memory() -> None:
    """For the rest of this process; does nothing where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    set_option(_MMAP_MAX, 0)
    set_option(_TRIM_THRESHOLD, 2**31 - 1)
    set_option(_TOP_PAD, 64 * 2**20)
