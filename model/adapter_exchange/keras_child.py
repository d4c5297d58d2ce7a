"""The program that reads a ``.lora.h5`` file and gives it back as safetensors.

``python -m model.adapter_exchange.keras_child``, started by `model.adapter_exchange.keras_process`:
the parser of HDF5 is where a hostile file does most harm. It opens no file at all. On stdin come
one line of JSON and the content; on stdout go the answers of `model.presets.confinement`, and after
"finished" as many bytes as that says: tensors ``<place>.a`` and ``<place>.b``, the rank as text.
"""

import dataclasses
import io
import json
import sys
from dataclasses import dataclass

import numpy as np

from model.adapter_exchange.keras_datasets import LoraDatasets, read_datasets
from model.presets.confinement import Answers, Budget, answer, confine
from model.presets.safetensors_stream import TensorPlan, tensor_bytes

_MAX_REQUEST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Request:
    """What comes before the content.

    Attributes:
        source: The file, as errors name it.
        budget: The limits.
        parent: The process that asks, with which this one ends.
    """

    source: str
    budget: Budget
    parent: int

    def to_line(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Request":
        fields = json.loads(line)
        return cls(**{**fields, "budget": Budget(**fields["budget"])})


def main() -> int:
    """Reads what stdin holds; returns the exit status."""
    answers = Answers()
    request = Request.from_line(sys.stdin.buffer.readline(_MAX_REQUEST_BYTES))
    content = sys.stdin.buffer.read()
    confine(request.parent)

    def work() -> None:
        datasets = read_datasets(io.BytesIO(content), request.source)
        tensors = _as_safetensors(datasets)
        answers.send("finished", bytes=len(tensors))
        answers.send_content(tensors)

    return answer(answers, request.budget, work)


def _as_safetensors(datasets: LoraDatasets) -> bytes:
    named = {
        f"{place}.{name}": array
        for place, pair in datasets.pairs.items()
        for name, array in zip("ab", pair, strict=True)
    }
    plans = [TensorPlan(name, array.shape, np.dtype(np.float32)) for name, array in named.items()]
    return tensor_bytes(plans, named.values(), {"rank": str(datasets.rank)})


if __name__ == "__main__":
    sys.exit(main())
