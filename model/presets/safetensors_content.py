"""The tensors of a safetensors file that is in memory."""

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from model.presets.safetensors_header import SafetensorsHeader, check_tensors

_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_tensors(
    content: bytes, header: SafetensorsHeader, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[np.float32]]:
    """The tensors of ``shapes``, of which the file holds exactly those, as float32.

    What is float32 there is not copied, and cannot be written.

    Raises:
        PresetFileInvalid: As `check_tensors`.
    """
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, place in check_tensors(header, shapes).items():
        stored = np.frombuffer(
            content, _DTYPES[place.dtype], math.prod(shapes[name]), place.start
        ).reshape(shapes[name])
        arrays[name] = stored.astype(np.float32, copy=False)
    return arrays
