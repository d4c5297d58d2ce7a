"""What the C library does with freed memory, where it can be told (glibc; nothing elsewhere).

A result of more than 32 MB, such as the logits of 32 rows, would get new pages from the system for
every call and give them back after it: a third of the time of the product that fills them. So large
results come out of the heap, where the next one finds the same pages. And what warm-up needed for a
moment is given back once, as the heap would keep hundreds of megabytes of a real model.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# Free memory at the end of the heap that is kept for what comes next.
_MOST_KEPT_BYTES = 128 * 2**20


def reuse_freed_memory() -> None:
    """From now on, in this process."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT_BYTES)


def give_back_freed_memory() -> None:
    """All of it, now."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
