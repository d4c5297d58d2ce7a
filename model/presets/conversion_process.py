"""Has a preset read in a process of its own, and watches that process.

Nothing that comes back is trusted: the answers are bounded and parsed strictly, and the file is
checked by the caller as if it had come with the preset. Whatever happens to the child, the caller
gets the file or one `PresetError`, within a time that follows from the size of the model.
"""

import contextlib
import dataclasses
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from model import errors
from model.config import GemmaConfig
from model.errors import PresetError, PresetFileInvalid
from model.presets.conversion_child import (
    GGUF,
    HUGGING_FACE,
    KERAS,
    OS_ERROR,
    OUT_OF_MEMORY,
    UNEXPECTED,
    Budget,
    Request,
)
from model.presets.hf_directory import HuggingFacePreset
from model.presets.keras_directory import KerasPreset
from model.presets.reader import PresetReader
from model.presets.strict_json import parse_object
from model.progress import Progress
from model.weight_names import num_parameters, weight_specs

# Slower than any disk or processor that this is meant for: who needs longer hangs.
_SLOWEST_BYTES_PER_SECOND = 10_000_000
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
        "PresetError",
        "PresetNotFound",
        "PresetFileMissing",
        "PresetFileInvalid",
        "UnsupportedPreset",
    )
}


@dataclass(frozen=True, slots=True)
class ConversionLimits:
    """What reading a preset may take.

    Attributes:
        budget: What the kernel enforces.
        array_seconds: Until the next array must be there.
        all_seconds: Until everything must be written.
    """

    budget: Budget
    array_seconds: float
    all_seconds: float


def limits_for(config: GemmaConfig, num_files: int) -> ConversionLimits:
    """What a sound preset of this size needs, with room.

    Memory: at most four float32 copies of one array are alive at once (the last one, and the next
    as it is stored, as it is computed and as it is used), and libraries keep some beside.
    """
    output_bytes = 4 * num_parameters(config)
    largest_bytes = max(4 * math.prod(spec.shape) for spec in weight_specs(config))
    return ConversionLimits(
        Budget(
            memory_bytes=(256 << 20) + 4 * largest_bytes,
            cpu_seconds=30 + output_bytes // _SLOWEST_BYTES_PER_SECOND,
            file_bytes=(8 << 20) + output_bytes,
            open_files=32 + 2 * num_files,
        ),
        array_seconds=10.0 + largest_bytes / _SLOWEST_BYTES_PER_SECOND,
        all_seconds=60.0 + 2 * output_bytes / _SLOWEST_BYTES_PER_SECOND,
    )


def write_weights(
    reader: PresetReader,
    target: Path,
    *,
    progress: Progress,
    limits: ConversionLimits | None = None,
) -> None:
    """Has the weights of ``reader`` written to ``target`` as float32 safetensors.

    Args:
        reader: Says where the preset is; the child opens it anew.
        target: The file to be made. Its content is the child's claim.
        progress: Told the bytes done, in the phase "convert".
        limits: `limits_for` the reader's config unless given.

    Raises:
        PresetError: As the reader would, or because the child died or broke a limit.
        OSError: The file cannot be written.
    """
    kind, source = _place(reader)
    limits = limits or limits_for(reader.config, len(reader.source_files))
    request = Request(kind, str(source), str(target.absolute()), limits.budget, os.getpid())
    with _running(request) as process:
        _Conversion(process, reader, limits, progress).run()


def _place(reader: PresetReader) -> tuple[str, Path]:
    if isinstance(reader, KerasPreset):
        return KERAS, reader.directory.absolute()
    if isinstance(reader, HuggingFacePreset):
        return HUGGING_FACE, reader.directory.absolute()
    # Imported late: the presets above need no GGUF packages.
    from model.presets.gguf_file import GgufPreset

    assert isinstance(reader, GgufPreset), f"the child cannot open a {type(reader).__name__}"
    return GGUF, reader.header.path.absolute()


@contextlib.contextmanager
def _running(request: Request) -> Iterator[subprocess.Popen[bytes]]:
    """The child, which does not outlive the block."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "model.presets.conversion_child"],
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
                process.stdin.write(request.to_json())
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


class _Conversion:
    """Follows one child from its start to its end."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: PresetReader,
        limits: ConversionLimits,
        progress: Progress,
    ) -> None:
        assert process.stdout is not None
        self._process = process
        self._answers = _Answers(process.stdout)
        self._config = reader.config
        self._limits = limits
        self._progress = progress
        first = reader.source_files[0].parent
        self._files = f"{first} ({', '.join(path.name for path in reader.source_files[:4])})"

    def run(self) -> None:
        """Returns when the child says that it has finished."""
        answer = self._next(time.monotonic() + _START_SECONDS)
        if answer is None or answer.get("event") != "started":
            raise PresetError(
                "The process that reads presets did not start; the log has its last words."
            )
        total = 4 * num_parameters(self._config)
        end = time.monotonic() + self._limits.all_seconds
        done = 0
        while True:
            # When all arrays are there, nothing of the preset is read any more: the disk is busy.
            pause = self._limits.array_seconds if done < total else math.inf
            answer = self._next(min(time.monotonic() + pause, end))
            match answer:
                case {"event": "done", "bytes": int(now)} if done < now <= total:
                    done = now
                    self._progress("convert", float(done), float(total))
                case {"event": "config", "config": dict(config)}:
                    self._compare(config)
                case {"event": "failed", "error": str(error), "message": str(message)}:
                    raise self._translated(error, message[:_MAX_MESSAGE_CHARACTERS])
                case {"event": "finished"} if done == total:
                    return
                case None:
                    raise PresetFileInvalid(f"Reading {self._files} {self._cause_of_death()}.")
                case _:
                    raise PresetFileInvalid(
                        f"Reading {self._files} went wrong: the process that reads it gave the "
                        f"answer {answer!r:.100}. The files are damaged or hostile."
                    )

    def _next(self, deadline: float) -> dict[str, object] | None:
        began = time.monotonic()
        try:
            return self._answers.next(deadline)
        except TimeoutError:
            waited = time.monotonic() - began
            raise PresetFileInvalid(
                f"Reading {self._files} stalled: nothing came for {waited:.1f} s, and at most "
                f"{self._limits.all_seconds:.0f} s are given to all of it. The files are damaged, "
                "or their disk is too slow."
            ) from None

    def _compare(self, config: dict[object, object]) -> None:
        # Through JSON, because the child's went that way: tuples are lists there.
        if config != json.loads(json.dumps(dataclasses.asdict(self._config))):
            raise PresetFileInvalid(
                f"{self._files} changed while it was being converted; try again when its files "
                "are complete."
            )

    def _translated(self, error: str, message: str) -> Exception:
        if error in _PRESET_ERRORS:
            failure: Exception = _PRESET_ERRORS[error](message)
            return failure
        if error == OS_ERROR:
            return OSError(message)
        if error == OUT_OF_MEMORY:
            return PresetFileInvalid(
                f"Reading {self._files} needs more memory than a model of this size explains: "
                f"{self._limits.budget.memory_bytes:,} bytes. The files are damaged or hostile, or "
                "the machine has too little memory."
            )
        what = message if error == UNEXPECTED else "an unknown error"
        return PresetError(f"Reading {self._files} failed with {what}; the log has the details.")

    def _cause_of_death(self) -> str:
        status = self._process.wait()
        match -status:
            case signal.SIGXCPU:
                seconds = self._limits.budget.cpu_seconds
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


class _Answers:
    """The child's JSON lines. It is not trusted: each is bounded, and has its time."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._buffer = b""

    def next(self, deadline: float) -> dict[str, object] | None:
        """The next answer, or None at the end of the pipe. Raises TimeoutError."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if len(self._buffer) > _MAX_ANSWER_BYTES:
                    raise PresetFileInvalid("The process that reads presets talks nonsense.")
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                chunk = os.read(self._pipe.fileno(), _MAX_ANSWER_BYTES)
                if not chunk:
                    return None
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return parse_object(line, "What the process that reads presets says")
