"""Writes a safetensors file tensor by tensor, its header first.

The library wants all tensors at once and copies them. Here one is in memory at a time, because
all names, shapes and dtypes are known before the first comes.
"""

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}
# Tensors start at a multiple of it, as far as their own sizes allow: JAX on a CPU uses a mapped
# array where it lies if it lies so. The format asks for 8.
_ALIGNMENT_BYTES = 64
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to be written. ``dtype`` is float32 or bfloat16."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, plans: Sequence[TensorPlan], arrays: Iterable[NDArray[np.float32]]
) -> None:
    """A new file with ``arrays`` as ``plans`` describes them, synced, for its owner alone."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        _write(file, plans, arrays, {})
        file.flush()
        os.fsync(file.fileno())


def tensor_bytes(
    plans: Sequence[TensorPlan],
    arrays: Iterable[NDArray[np.float32]],
    metadata: Mapping[str, str],
) -> bytes:
    """The same as the bytes of a file, with texts beside the tensors; one file for one input."""
    file = io.BytesIO()
    _write(file, plans, arrays, metadata)
    return file.getvalue()


def tensors_head(plans: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    """What stands before the tensors."""
    # Readers of PyTorch refuse files that do not say which framework's layout they have.
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for plan in plans:
        header[plan.name] = {
            "dtype": _DTYPE_NAMES[plan.dtype.name],
            "shape": list(plan.shape),
            "data_offsets": [start, start + plan.num_bytes],
        }
        start += plan.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _write(
    file: io.BufferedIOBase,
    plans: Sequence[TensorPlan],
    arrays: Iterable[NDArray[np.float32]],
    metadata: Mapping[str, str],
) -> None:
    file.write(tensors_head(plans, metadata))
    for plan, array in zip(plans, arrays, strict=True):
        assert array.shape == plan.shape, f"{plan} was planned, {array.shape} came"
        stored = np.ascontiguousarray(array, dtype=plan.dtype)
        # As bytes, because the buffer protocol has no bfloat16.
        file.write(stored.reshape(-1).view(np.uint8).data)
