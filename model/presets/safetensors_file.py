"""Writes the arrays of a preset as one safetensors file, without holding them all in memory."""

import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from model.gemma.weights import num_parameters, weight_specs
from model.presets.reader import PresetReader
from model.progress import Progress


def write_safetensors(path: Path, reader: PresetReader, *, progress: Progress) -> None:
    """Writes ``path``, synced and readable by its owner alone.

    The library wants all arrays at once, and a model that fits in memory as bfloat16 may not fit
    as float32. So they go to a scratch file beside ``path`` first, and are mapped from there.
    """
    scratch = path.with_suffix(".scratch")
    _write_in_order(scratch, reader, progress)
    save_file(_mapped(scratch, reader), path)
    scratch.unlink()
    path.chmod(0o600)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_in_order(scratch: Path, reader: PresetReader, progress: Progress) -> None:
    total = 4.0 * num_parameters(reader.config)
    specs = list(weight_specs(reader.config))
    with scratch.open("xb") as file:
        for spec, (name, array) in zip(specs, reader.arrays(), strict=True):
            assert (name, array.shape) == (spec.name, spec.shape), (
                f"the reader gave {name} {array.shape} where {spec} belongs"
            )
            assert array.dtype == np.float32, f"the reader gave {name} as {array.dtype}"
            assert array.flags.c_contiguous, f"the reader gave {name} in another order"
            file.write(array.data)
            progress("convert", float(file.tell()), total)


def _mapped(scratch: Path, reader: PresetReader) -> dict[str, NDArray[np.float32]]:
    flat = np.memmap(scratch, dtype=np.float32, mode="r")
    arrays: dict[str, NDArray[np.float32]] = {}
    start = 0
    for spec in weight_specs(reader.config):
        stop = start + math.prod(spec.shape)
        arrays[spec.name] = flat[start:stop].reshape(spec.shape)
        start = stop
    return arrays
