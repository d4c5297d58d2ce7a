"""The program that reads a preset and writes its weights as one safetensors file.

``python -m model.presets.conversion_child``, started by `model.presets.conversion_process`. The
parsers of HDF5 and GGUF are where a hostile file does most harm, so in the service they run here:
in a process without a network, which may take only so much memory, time and disk, and which can
be killed.

Its life: a request, one JSON object on stdin; libraries are imported; limits are set; only then is
a file of the preset opened. It answers in JSON lines on stdout: "started", "config", "done" with
the bytes so far after every array, and at last "finished" or "failed".
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.presets.confinement import Answers, Budget, answer, confine
from model.presets.reader import PresetReader
from model.presets.safetensors_stream import TensorPlan, write_tensors
from model.weight_names import weight_specs

KERAS = "keras"
HUGGING_FACE = "hugging_face"
GGUF = "gguf"


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


def main() -> int:
    """Converts what stdin asks for; returns the exit status."""
    answers = Answers()
    request = Request.from_json(sys.stdin.buffer.read())
    confine(request.parent)
    open_reader = _opener(request.kind)

    def work() -> None:
        _convert(open_reader(Path(request.source)), Path(request.target), answers)
        answers.send("finished")

    return answer(answers, request.budget, work)


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


def _convert(reader: PresetReader, target: Path, answers: Answers) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
