"""Runs one command in a worker process, shows how far it is, and returns what it says.

The process is ``python -m service.worker <command>``, so that this one never loads the model. It
ends with this one: by the kernel's parent-death signal, by SIGTERM when a person interrupts.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

import msgspec

from service.exit_status import Exit, ExitStatus
from service.logs import JsonLines
from service.own_modules import own_modules
from service.protocol.command_lines import Advanced, CommandFailed, Result, decode
from service.startup_display import startup_display

# It removes what is half written, which takes a moment.
_STOP_SECONDS = 10.0
_LAST_WORDS_SECONDS = 2.0


def run_in_worker(words: Sequence[str], log_level: str) -> list[Result]:
    """The results of one command, its progress shown on standard error meanwhile.

    Args:
        words: The command and its arguments, as `service.worker.commands` takes them.
        log_level: Of the process.

    Raises:
        Exit: It failed, or died.
        KeyboardInterrupt: A person interrupted it; the process is gone.
    """
    with _running(words, log_level) as process, _Log(process) as log:
        lines = _lines(process)
        status = process.wait()
        log.finish()
    results: list[Result] = []
    for line in lines:
        if isinstance(line, CommandFailed):
            raise Exit(ExitStatus(line.status), line.message)
        results.append(line)
    if status != ExitStatus.OK:
        ending = f"{words[0]} failed: its process ended with {_describe(status)}."
        raise Exit(ExitStatus.BUG, ending)
    return results


def _lines(process: "subprocess.Popen[bytes]") -> list[Result | CommandFailed]:
    """What it says until it closes its output, but for its progress, which is shown."""
    assert process.stdout is not None
    lines: list[Result | CommandFailed] = []
    display = startup_display()
    try:
        for raw in process.stdout:
            line = decode(raw)
            if isinstance(line, Advanced):
                display.progress(line.phase, line.done, line.total)
            else:
                lines.append(line)
    except msgspec.DecodeError as error:
        raise Exit(ExitStatus.BUG, f"The worker process talks nonsense: {error}.") from error
    finally:
        display.close()
    return lines


@contextlib.contextmanager
def _running(words: Sequence[str], log_level: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The process, which does not outlive the block."""
    command, *arguments = words
    options = ["--parent", str(os.getpid()), "--log-level", log_level]
    previous = signal.signal(signal.SIGTERM, _end)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "service.worker", command, *options, *arguments],
        env={**os.environ, "PYTHONPATH": own_modules()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Ctrl-C in a terminal reaches the whole group; only we decide when the process stops.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        try:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_SECONDS)
        finally:
            # At once after another Ctrl-C; it may have ended long ago.
            process.kill()
            process.wait()
            signal.signal(signal.SIGTERM, previous)


def _end(number: int, frame: FrameType | None) -> None:
    """The handler of SIGTERM: ends this process as Ctrl-C does."""
    sys.exit(ExitStatus.TERMINATED)


class _Log:
    """Passes on what the process writes to its standard error, as lines of the log.

    Once the block is left by an exception nothing is: a process that was stopped has nothing to
    tell.
    """

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stderr is not None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, args=(process.stderr,), daemon=True)

    def __enter__(self) -> "_Log":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    def finish(self) -> None:
        """Waits for the last words of a process that has ended."""
        self._thread.join(_LAST_WORDS_SECONDS)

    def _pass_on(self, pipe: IO[bytes]) -> None:
        for raw in pipe:
            if not self._is_over.is_set():
                # By its name: while bars are shown, it is another stream than at the start.
                sys.stderr.write(_as_log_line(raw.decode(errors="replace").rstrip("\n")) + "\n")


def _as_log_line(text: str) -> str:
    """A line of the log as it is; anything else, such as a traceback, as a warning."""
    with contextlib.suppress(ValueError):
        line = json.loads(text)
        if isinstance(line, dict) and "logger" in line:
            return text
    facts = {"name": "service.worker", "levelno": logging.WARNING, "levelname": "WARNING"}
    return JsonLines().format(logging.makeLogRecord({**facts, "msg": text}))


def _describe(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name
    return f"{name} (out of memory?)" if name == "SIGKILL" else name
