"""A worker must not outlive the API process that started it."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Asks the kernel to kill this process when its parent dies.

    The end of file on the socket does the same a moment later, on systems without this call too.

    Args:
        parent_pid: Of the process that started this one. If it is already gone, the signal would
            never come, so the process ends here.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)
