"""Memory that was freed goes back to the system.

What warm-up needs for a moment stays with the process otherwise: hundreds of megabytes of a real
model, as an allocator keeps what may be asked for again.
"""

import ctypes


def give_back_freed_memory() -> None:
    """Where the C library offers it (glibc does); elsewhere nothing is to be done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
