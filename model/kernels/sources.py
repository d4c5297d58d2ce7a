"""The C++ files of the kernels, and the name of the library that belongs to exactly these.

The name holds a digest of everything that decides what the library does: names and bytes of the
sources, flags, machine, and the jaxlib that it talks to. So a library of other sources is never
loaded by mistake; it is as if there were none.
"""

import hashlib
import importlib.metadata
import platform
from pathlib import Path

DIRECTORY = Path(__file__).parent
# No -march: each function names the instructions it needs, and one is chosen when it runs. No
# contraction: a product and a sum are rounded alike wherever the compiler puts them.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-pthread",
)


def source_files(directory: Path = DIRECTORY) -> list[Path]:
    """What is compiled, and what that includes."""
    files = (directory / "source").glob("*")
    return sorted(file for file in files if file.suffix in (".cc", ".h"))


def library_file(directory: Path = DIRECTORY) -> Path:
    """Where the library of the sources under ``directory`` lies once it is built."""
    digest = hashlib.sha256()
    parts = [*FLAGS, platform.system(), platform.machine()]
    for file in source_files(directory):
        parts += [file.name, hashlib.sha256(file.read_bytes()).hexdigest()]
    digest.update("\0".join(parts).encode())
    name = f"{digest.hexdigest()[:16]}-{importlib.metadata.version('jaxlib')}.so"
    return directory / "_build" / name
