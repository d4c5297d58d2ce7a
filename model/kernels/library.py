"""The kernels of this process: the library for these sources, or the portable path and why.

A library is loaded and its functions are made known to XLA once a process. Nothing is built here: a
library that is missing, or was made from other sources, is a reason that operators read.
"""

import functools
from dataclasses import dataclass

import jax

from model.errors import KernelsUnavailable
from model.kernels.choice import KernelChoice
from model.kernels.exports import INSTRUCTION_SETS, TARGETS, instruction_set, open_library
from model.kernels.sources import library_file


@dataclass(frozen=True, slots=True)
class Kernels:
    """What computes products.

    Attributes:
        name: The instruction set of native kernels, or ``xla``.
        is_native: Whether the targets of `model.kernels.exports` can be called.
        reason: Why they cannot; empty if they can.
        library: Name of the file that they are in, which stands for its sources; or empty.
    """

    name: str
    is_native: bool
    reason: str
    library: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def load_kernels(choice: KernelChoice = "auto") -> Kernels:
    """Native kernels if they were not switched off and can be used, or else the portable path.

    Raises:
        KernelsUnavailable: ``choice`` is ``native`` and they cannot be used here.
    """
    if choice == "xla":
        return _portable("switched off")
    kernels = _loaded()
    if choice == "native" and not kernels.is_native:
        raise KernelsUnavailable(
            f"Native kernels were asked for (--kernels native) and there are none: "
            f"{kernels.reason}."
        )
    return kernels


@functools.cache
def _loaded() -> Kernels:
    if (backend := jax.default_backend()) != "cpu":
        return _portable(f"JAX computes on {backend}, and they are for the CPU")
    file = library_file()
    if not file.exists():
        return _portable("not built for these sources; run make install")
    try:
        library = open_library(file)
        name = instruction_set(library)
    except OSError as error:
        return _portable(f"{error}; delete {file} and run make install")
    if not name:
        return _portable(f"this processor has none of {', '.join(INSTRUCTION_SETS)}")
    for target, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(library[symbol]), platform="cpu")
    return Kernels(name, is_native=True, reason="", library=file.name)


def _portable(reason: str) -> Kernels:
    return Kernels("xla", is_native=False, reason=reason)
