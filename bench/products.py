"""Products of a few rows against the time of reading their matrix: ``python -m bench.products``.

The vocabulary product of Gemma 3 270M, 262,144 × 640 in float32, by the native kernel and by XLA.
Reading, kernel and XLA take turns; each ratio is of neighbours in time, and the table has medians.
Needs a C++ compiler, for the reader.
"""

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from model.gemma.projection import real_projection
from model.kernels.build import compilers
from model.kernels.library import load_kernels
from model.kernels.product import product
from model.process_memory import reuse_freed_memory

_OUT, _IN = 262_144, 640
_ROW_COUNTS = (1, 2, 4, 8, 16, 32)
_ASKED = {1: 1.1, 8: 1.3, 16: 1.8, 32: 3.0}
_ROUNDS = 15
_READER = Path(__file__).parent / "memory" / "read.cc"


def reader(directory: Path) -> Callable[[np.ndarray], float]:
    """Milliseconds that all cores take to read an array."""
    file = directory / "read.so"
    words = next(compilers()).words
    flags = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
    subprocess.run([*words, *flags, str(_READER), "-o", str(file)], check=True)
    library = ctypes.CDLL(str(file))
    library.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    num_threads = len(os.sched_getaffinity(0))

    def read(array: np.ndarray) -> float:
        began = time.perf_counter()
        library.read_memory(array.ctypes.data, array.nbytes, num_threads)
        return (time.perf_counter() - began) * 1e3

    return read


def call_ms(call: Callable[..., jax.Array], x: jax.Array, weight: jax.Array) -> float:
    began = time.perf_counter()
    call(x, weight).block_until_ready()
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    # As the process that serves does.
    reuse_freed_memory()
    kernels = load_kernels("native")
    generator = np.random.default_rng(0)
    weight = jnp.asarray(generator.normal(size=(_OUT, _IN)).astype(np.float32))
    own = np.asarray(weight)
    ways = {
        kernels.name: jax.jit(product),
        "XLA": jax.jit(lambda x, weight: real_projection(x[:, None], weight)[:, 0]),
    }
    load = Path("/proc/loadavg").read_text().split()[0]
    lines = [f"load before: {load}; {_OUT:,} × {_IN} float32, {own.nbytes / 1e6:.0f} MB", ""]
    lines += ["| rows | reading, ms | kernel, ms | kernel : reading | asked | XLA : reading |"]
    lines += ["|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as directory:
        read = reader(Path(directory))
        read(own)
        for rows in _ROW_COUNTS:
            x = jnp.asarray(generator.normal(size=(rows, _IN)).astype(np.float32))
            for call in ways.values():
                call_ms(call, x, weight)
            reading, took, ratios = [], [], {way: [] for way in ways}  # type: ignore[var-annotated]
            for _ in range(_ROUNDS):
                for way, call in ways.items():
                    before, mine, after = read(own), call_ms(call, x, weight), read(own)
                    ratios[way].append(mine / ((before + after) / 2))
                    reading += [before, after]
                    if way == kernels.name:
                        took.append(mine)
            native, xla = (statistics.median(ratios[way]) for way in ways)
            asked = f"{_ASKED[rows]:g} ×" if rows in _ASKED else ""
            lines.append(
                f"| {rows} | {statistics.median(reading):.1f} | {statistics.median(took):.1f} "
                f"| {native:.2f} × | {asked} | {xla:.2f} × |"
            )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
