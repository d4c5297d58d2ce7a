"""The limits of a process that reads the files of others, as it sets them itself.

`model.presets.watched_process` is the other side. What runs here imports its libraries first, then
gives up the network and most of its memory, time and disk, and only then sees a file. It answers in
JSON lines on what was stdout: "started", what the work says, and at last "finished" or "failed".
"""

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.errors import PresetError

# What "failed" names beside the classes of `model.errors`.
OUT_OF_MEMORY = "out of memory"
OS_ERROR = "error of the system"
UNEXPECTED = "unexpected"

_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True)
class Budget:
    """What the program may take from the system once its libraries are imported.

    Attributes:
        memory_bytes: Of address space.
        cpu_seconds: Of processor time.
        file_bytes: Of each file that it writes.
        open_files: At once.
    """

    memory_bytes: int
    cpu_seconds: int
    file_bytes: int
    open_files: int


class Answers:
    """The way back to the parent: what was stdout, so that no library can print between."""

    def __init__(self) -> None:
        self._pipe = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)

    def send(self, event: str, **fields: object) -> None:
        self._write(json.dumps({"event": event, **fields}).encode() + b"\n")

    def send_content(self, content: bytes) -> None:
        """Bytes, of which the last event told the number."""
        self._write(content)

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:  # a signal may come between
            left = left[self._pipe.write(left) :]


def answer(answers: Answers, budget: Budget, work: Callable[[], None]) -> int:
    """Does the work under the limits and tells how it ended; returns the exit status.

    The work itself says that it has finished.
    """
    _limit(budget)
    answers.send("started")
    try:
        work()
    except PresetError as error:
        answers.send("failed", error=type(error).__name__, message=str(error))
    except MemoryError:
        answers.send("failed", error=OUT_OF_MEMORY, message="")
    except OSError as error:
        answers.send("failed", error=OS_ERROR, message=error.strerror or str(error))
    except Exception as error:
        traceback.print_exc()
        answers.send("failed", error=UNEXPECTED, message=type(error).__name__)
    else:
        return 0
    return 1


def confine(parent: int) -> None:
    """Ends with the parent and sees no network, where the kernel grants it."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it died before, so the signal would never come
    # A user namespace only if need be: in it, root loses the right to read other people's files.
    # Containers often refuse both. The other limits hold all the same, so that is no error.
    if libc.unshare(_CLONE_NEWNET) != 0:
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _limit(budget: Budget) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = int(used.ru_utime + used.ru_stime) + 1 + budget.cpu_seconds
    # The first limit sends SIGXCPU, by which the parent knows the cause; the second one kills.
    _lower(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 5)
    _lower(resource.RLIMIT_FSIZE, budget.file_bytes)
    _lower(resource.RLIMIT_NOFILE, budget.open_files)
    _lower(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":  # others neither say what is in use nor keep the limit
        pages_in_use = int(Path("/proc/self/statm").read_text().split()[0])
        in_use = pages_in_use * resource.getpagesize()
        _lower(resource.RLIMIT_AS, in_use + budget.memory_bytes)


def _lower(limit: int, soft: int, hard: int | None = None) -> None:
    """Sets a limit for good, unless a stricter one is in force."""
    wanted = soft if hard is None else hard
    in_force = resource.getrlimit(limit)[1]
    most = wanted if in_force == resource.RLIM_INFINITY else min(wanted, in_force)
    resource.setrlimit(limit, (min(soft, most), most))
