"""A child that reads files of others, as its parent sees it: started, heard, and never believed.

`model.presets.confinement` is the other side. Every answer is bounded and has its time; whatever
happens to the child, the caller gets an answer or one `PresetError`.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO

from model import errors
from model.errors import PresetError, PresetFileInvalid
from model.presets.confinement import OS_ERROR, OUT_OF_MEMORY, UNEXPECTED, Budget
from model.presets.strict_json import parse_object

_START_SECONDS = 120.0
_MAX_ANSWER_BYTES = 1 << 16
_MAX_MESSAGE_CHARACTERS = 2_000

_ENVIRONMENT = (
    "DYLD_LIBRARY_PATH",
    "HOME",
    "LANG",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONHOME",
    "PYTHONPATH",
    "TMPDIR",
)

_PRESET_ERRORS = {
    name: getattr(errors, name)
    for name in (
        "AdapterUnfit",
        "PresetError",
        "PresetNotFound",
        "PresetFileMissing",
        "PresetFileInvalid",
        "UnsupportedPreset",
    )
}


@contextlib.contextmanager
def running(module: str, request: bytes) -> Iterator[subprocess.Popen[bytes]]:
    """The child, which does not outlive the block; ``request`` is all that it reads."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=_environment(),
        # Ctrl-C in a terminal reaches the whole group; the child ends when its parent says so.
        start_new_session=True,
    ) as process:
        try:
            assert process.stdin is not None
            # If the child is dead already, its answers say so: there are none.
            with contextlib.suppress(BrokenPipeError):
                left = memoryview(request)
                while left:  # a signal may come between
                    left = left[process.stdin.write(left) :]
                process.stdin.close()
            yield process
        finally:
            process.kill()


def _environment() -> dict[str, str]:
    """What Python needs, and none of the keys and tokens beside it.

    The child has the modules of this process, and none out of the folder where a person stands.
    """
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    kept["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # Threads that it does not need would take address space, and forbid to leave the network.
    return kept | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class WatchedProcess:
    """One child from its start to its end.

    Args:
        process: Of `running`.
        files: What it reads, as errors name it.
        budget: Its limits.
        all_seconds: Given to all of it, for errors.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], *, files: str, budget: Budget, all_seconds: float
    ) -> None:
        assert process.stdout is not None
        self._process = process
        self._pipe: IO[bytes] = process.stdout
        self._files = files
        self._budget = budget
        self._all_seconds = all_seconds
        self._buffer = b""

    def await_start(self) -> None:
        """Returns when it is about to look at the files."""
        answer = self.next_answer(time.monotonic() + _START_SECONDS)
        if answer is None or answer.get("event") != "started":
            raise PresetError(
                "The process that reads files did not start; the log has its last words."
            )

    def next_answer(self, deadline: float) -> dict[str, object] | None:
        """What it says next, or None at its end."""
        while b"\n" not in self._buffer:
            if len(self._buffer) > _MAX_ANSWER_BYTES:
                raise PresetFileInvalid("The process that reads files talks nonsense.")
            if not self._receive(deadline):
                return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return parse_object(line, "What the process that reads files says")

    def next_content(self, num_bytes: int, deadline: float) -> bytes | None:
        """Bytes of which it told the number, or None if it ends before."""
        pieces = [self._buffer]
        left = num_bytes - len(self._buffer)
        self._buffer = b""
        while left > 0:
            if not self._receive(deadline):
                return None
            pieces.append(self._buffer)
            left -= len(self._buffer)
            self._buffer = b""
        return b"".join(pieces)[:num_bytes]

    def failure(self, answer: dict[str, object] | None) -> Exception:
        """What an answer means that is not the one that was hoped for."""
        match answer:
            case {"event": "failed", "error": str(error), "message": str(message)}:
                return self._translated(error, message[:_MAX_MESSAGE_CHARACTERS])
            case None:
                return PresetFileInvalid(f"Reading {self._files} {self._cause_of_death()}.")
        return PresetFileInvalid(
            f"Reading {self._files} went wrong: the process that reads it gave the answer "
            f"{answer!r:.100}. The files are damaged or hostile."
        )

    def _receive(self, deadline: float) -> bool:
        began = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - began)):
                waited = time.monotonic() - began
                raise PresetFileInvalid(
                    f"Reading {self._files} stalled: nothing came for {waited:.1f} s, and at most "
                    f"{self._all_seconds:.0f} s are given to all of it. The files are damaged, or "
                    "their disk is too slow."
                )
        chunk = os.read(self._pipe.fileno(), _MAX_ANSWER_BYTES)
        self._buffer += chunk
        return bool(chunk)

    def _translated(self, error: str, message: str) -> Exception:
        if error in _PRESET_ERRORS:
            failure: Exception = _PRESET_ERRORS[error](message)
            return failure
        if error == OS_ERROR:
            return OSError(message)
        if error == OUT_OF_MEMORY:
            return PresetFileInvalid(
                f"Reading {self._files} needs more memory than a model of this size explains: "
                f"{self._budget.memory_bytes:,} bytes. The files are damaged or hostile, or "
                "the machine has too little memory."
            )
        what = message if error == UNEXPECTED else "an unknown error"
        return PresetError(f"Reading {self._files} failed with {what}; the log has the details.")

    def _cause_of_death(self) -> str:
        status = self._process.wait()
        match -status:
            case signal.SIGXCPU:
                seconds = self._budget.cpu_seconds
                return f"took more than {seconds} s of processor time; the files are damaged"
            case signal.SIGKILL:
                return "was killed by the system, most likely for lack of memory"
            case number if number > 0:
                name = signal.Signals(number).name
                return (
                    f"crashed the library that does it ({name}); the files are damaged, or need "
                    "more memory than a model of this size explains"
                )
            case _:
                return f"ended with status {status}; the log has the last words"
