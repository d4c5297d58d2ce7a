"""The program that reads a preset and writes its weights as one safetensors file.

``python -m model.presets.conversion_child``, started by `model.presets.conversion_process`. The
parsers of HDF5 and GGUF are where a hostile file does most harm, so in the service they run here:
in a process without a network, which may take only so much memory, time and disk, and which can
be killed.

Its life: a request, one JSON object on stdin; libraries are imported; limits are set; only then is
a file of the preset opened. It answers in JSON lines on stdout: "started", "config", "done" with
the bytes so far after every array, and at last "finished" or "failed".
"""

import ctypes
import dataclasses
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.errors import PresetError
from model.presets.reader import PresetReader
from model.presets.safetensors_stream import TensorPlan, write_tensors
from model.weight_names import weight_specs

KERAS = "keras"
HUGGING_FACE = "hugging_face"
GGUF = "gguf"

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


@dataclass(frozen=True, slots=True)
class Request:
    """What the program is asked to do.

    Attributes:
        kind: `KERAS`, `HUGGING_FACE` or `GGUF`.
        source: The preset's directory or file.
        target: The safetensors file to be made.
        budget: Its limits.
        parent: The process that asks, with which this one ends.
    """

    kind: str
    source: str
    target: str
    budget: Budget
    parent: int

    def to_json(self) -> bytes:
        """What the program reads from stdin."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Request":
        """The inverse of `to_json`."""
        fields = json.loads(data)
        return cls(**{**fields, "budget": Budget(**fields["budget"])})


class _Answers:
    """The way back to the parent: what was stdout, so that no library can print between."""

    def __init__(self) -> None:
        self._pipe = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)

    def send(self, event: str, **fields: object) -> None:
        self._pipe.write(json.dumps({"event": event, **fields}).encode() + b"\n")


def main() -> int:
    """Converts what stdin asks for; returns the exit status."""
    answers = _Answers()
    request = Request.from_json(sys.stdin.buffer.read())
    _confine(request.parent)
    open_reader = _opener(request.kind)
    _limit(request.budget)
    answers.send("started")
    try:
        _convert(open_reader(Path(request.source)), Path(request.target), answers)
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
        answers.send("finished")
        return 0
    return 1


def _opener(kind: str) -> Callable[[Path], PresetReader]:
    """Imports what reads this kind; a Keras preset needs no GGUF packages."""
    match kind:
        case "keras":
            from model.presets.keras_directory import KerasPreset

            return KerasPreset.open
        case "hugging_face":
            from model.presets.hf_directory import HuggingFacePreset

            return HuggingFacePreset.open
        case "gguf":
            from model.presets.gguf_file import GgufPreset

            return GgufPreset.open
    raise AssertionError(f"nothing reads the kind {kind!r}")


def _convert(reader: PresetReader, target: Path, answers: _Answers) -> None:
    """All arrays as float32, one in memory at a time."""
    answers.send("config", config=dataclasses.asdict(reader.config))
    specs = list(weight_specs(reader.config))
    plans = [TensorPlan(spec.name, spec.shape, np.dtype(np.float32)) for spec in specs]

    def arrays() -> Iterator[NDArray[np.float32]]:
        done = 0
        for spec, (name, array) in zip(specs, reader.arrays(), strict=True):
            assert name == spec.name, f"the reader gave {name} where {spec} belongs"
            assert array.dtype == np.float32, f"the reader gave {name} as {array.dtype}"
            yield array
            done += array.nbytes
            answers.send("done", bytes=done)

    write_tensors(target, plans, arrays())


def _confine(parent: int) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
