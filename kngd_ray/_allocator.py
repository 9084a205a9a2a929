"""How a process that computes on the CPU keeps the memory of its tensors.

glibc takes large blocks from the system, and gives them back as soon as they are free. A tower frees and takes such
blocks layer by layer, a fit matrix by matrix, and the system clears each anew, page by page: on virtual machines this
takes a quarter of a fit's time, and more than all that a tower computes. Here freed memory is kept for the next tensor.
The most that a process takes stays the same.
"""

import ctypes
import os
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT = 1 << 30  # bytes
_ASKED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> bool:
    """Let this process keep blocks of up to 1 GiB that it has freed.

    Returns:
        Whether it does: not where the environment tunes the allocator, and not where the C library is another.
    """
    if any(name in os.environ for name in _ASKED):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _KEPT)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
