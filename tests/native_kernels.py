"""What tests of the native kernels share: instruction sets by name, and how far two results are."""

import ctypes

import numpy as np
import pytest

from model.kernels.build import compilers
from model.kernels.exports import open_library
from model.kernels.library import load_kernels
from model.kernels.sources import library_file

needs_native_kernels = pytest.mark.skipif(
    not load_kernels().is_native, reason=f"kernels here: {load_kernels()}"
)
needs_a_compiler = pytest.mark.skipif(
    not [compiler for compiler in compilers() if compiler.name != "ziglang"],
    reason="no C++ compiler of the system, and the one of a package has no sanitizers",
)


class InstructionSets:
    """Those of this processor; ``plain`` is the reference, slow and in plain C++."""

    def __init__(self) -> None:
        self._library = open_library(library_file())
        self._library.gemma_kernels_use.argtypes = (ctypes.c_char_p,)
        self.first_choice = load_kernels().name
        names = ("avx512", "avx2", "neon")
        self.fast = tuple(name for name in names if self._takes(name))
        self.use(self.first_choice)

    def _takes(self, name: str) -> bool:
        return bool(self._library.gemma_kernels_use(name.encode()))

    def use(self, name: str) -> None:
        """From now on, in this process."""
        assert self._takes(name), name


def distance(result: np.ndarray, expected: np.ndarray) -> float:
    """Of the norm of what is expected."""
    wrong = np.linalg.norm(np.asarray(result, np.float64) - np.asarray(expected, np.float64))
    return float(wrong / np.linalg.norm(np.asarray(expected, np.float64)))


def bits(x: np.ndarray) -> list[int]:
    """Of float32 numbers: -0 is not 0 here."""
    return np.asarray(x, np.float32).ravel().view(np.uint32).tolist()
