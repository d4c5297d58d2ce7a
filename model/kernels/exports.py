"""What a library of kernels exports, and a first look at one that was just compiled.

As a program, ``exports.py FILE`` opens a library and prints the instruction set that it chose: what
a compiler got wrong then ends that process and not a worker. Only the standard library is imported
here, so the program needs no package.
"""

import ctypes
import sys
from pathlib import Path

# XLA's name of a call -> the function of the library that handles it.
TARGETS = {
    "gemma_product": "GemmaProduct",
    "gemma_back_product": "GemmaBackProduct",
    "gemma_block": "GemmaBlock",
}
INSTRUCTION_SETS = ("avx512", "avx2", "neon")
_CHOSEN = "gemma_kernels_instruction_set"


def open_library(file: Path) -> ctypes.CDLL:
    """A library with everything that is expected of it.

    Raises:
        OSError: It cannot be opened here, or lacks a function.
    """
    library = ctypes.CDLL(str(file))
    for symbol in (_CHOSEN, *TARGETS.values()):
        if not hasattr(library, symbol):
            raise OSError(f"{file.name} does not export {symbol}")
    return library


def instruction_set(library: ctypes.CDLL) -> str:
    """One of `INSTRUCTION_SETS`, or nothing if this processor has none of them.

    Raises:
        OSError: The library names something else.
    """
    function = library[_CHOSEN]
    function.argtypes, function.restype = (), ctypes.c_char_p
    name = (function() or b"").decode(errors="replace")
    if name not in ("", *INSTRUCTION_SETS):
        raise OSError(f"the library chose an instruction set that is not known: {name!r:.40}")
    return name


def main() -> int:
    try:
        sys.stdout.write(instruction_set(open_library(Path(sys.argv[1]))))
    except OSError as error:
        sys.stderr.write(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
