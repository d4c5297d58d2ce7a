"""The build step of the kernels: ``python -m model.kernels.build``, as ``make install`` runs it.

All ``source/*.cc`` become one library in ``_build``. The compiler is the first that works of $CXX,
those of the system, and the one in the package ``ziglang`` if that is installed. What it made gets
its name only after another process has opened it, so builds beside each other, and those that are
stopped halfway, harm nobody.

One line says what was done. That nothing can be built is no failure, as the portable path needs no
library; with ``--require`` it is one, of a status of its own if a compiler is all that lacks.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.kernels import exports
from model.kernels.sources import DIRECTORY, FLAGS, library_file, source_files

_OF_THE_SYSTEM = ("c++", "g++", "clang++")
# Without -mcpu it compiles for the processor at hand, and the library may run on another. It links
# the C++ library into ours; -s leaves its symbols out, nine tenths of the file.
_ZIGLANG = ("-m", "ziglang", "c++", "-mcpu=baseline", "-s")
_COMPILE_SECONDS = 1800
_OPEN_SECONDS = 60
_SHOWN_LINES = 20
_EXIT_NOT_BUILT = 1
_EXIT_NO_COMPILER = 69  # EX_UNAVAILABLE


class NotBuilt(Exception):
    """There is no library for the sources. The message is a part of one line."""


class NoCompiler(NotBuilt):
    """Another compiler may build them."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler that may work: how to call it, and what a person calls it."""

    name: str
    words: tuple[str, ...]


def compilers() -> Iterator[Compiler]:
    """Those of this machine, in the order in which they are tried."""
    if named := shlex.split(os.environ.get("CXX", "")):
        yield Compiler("$CXX", tuple(named))
    seen = set()
    for name in _OF_THE_SYSTEM:
        file = shutil.which(name)
        # Usually two of these names are the same program.
        if file is not None and (program := os.path.realpath(file)) not in seen:
            seen.add(program)
            yield Compiler(name, (file,))
    if importlib.util.find_spec("ziglang") is not None:
        yield Compiler("ziglang", (sys.executable, *_ZIGLANG))


def build(directory: Path, candidates: Sequence[Compiler]) -> str:
    """Makes the library of the sources under ``directory``, unless it is there; says what it did.

    Raises:
        NoCompiler: No compiler made one.
        NotBuilt: There is nothing to compile, or no place for it.
    """
    target = library_file(directory)
    if target.exists():
        return f"up to date ({target.name})"
    units = [file for file in source_files(directory) if file.suffix == ".cc"]
    if not units:
        raise NotBuilt(f"{directory / 'source'} holds no .cc file")
    try:
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            return _build(units, target, candidates, Path(scratch) / target.name)
    except OSError as error:
        raise NotBuilt(f"{target.parent} cannot be written: {error.strerror}") from error


def _build(
    units: Sequence[Path], target: Path, candidates: Sequence[Compiler], scratch: Path
) -> str:
    for compiler in candidates:
        began = time.monotonic()
        problem = _compile(compiler, units, scratch) or _refusal(scratch)
        if problem:
            lines = problem.rstrip().splitlines()[-_SHOWN_LINES:]
            sys.stderr.write("\n".join([f"kernels: {compiler.name} failed:", *lines, ""]))
            continue
        if library_file(target.parents[1]) != target:
            raise NotBuilt("the sources changed meanwhile; run it again")
        scratch.replace(target)
        return f"built by {compiler.name} in {time.monotonic() - began:.1f} s ({target.name})"
    tried = ", ".join(compiler.name for compiler in candidates)
    raise NoCompiler(f"no C++ compiler works here (tried {tried or 'none, as none was found'})")


def _compile(compiler: Compiler, units: Sequence[Path], output: Path) -> str:
    """Runs a compiler; returns what it complains of if it fails."""
    # Imported late: what is up to date is so at once.
    import jax

    output.unlink(missing_ok=True)
    words = [*compiler.words, *FLAGS, "-I", jax.ffi.include_dir(), *map(str, units)]
    try:
        done = subprocess.run(
            [*words, "-o", str(output)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_COMPILE_SECONDS,
        )
    except OSError as error:
        return f"{compiler.words[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"it has not ended after {_COMPILE_SECONDS} s"
    return done.stdout or f"exit status {done.returncode}" if done.returncode else ""


def _refusal(library: Path) -> str:
    """Opens a library in a process that may die of it; returns what is wrong with it."""
    program = [sys.executable, "-I", exports.__file__, str(library)]
    try:
        done = subprocess.run(
            program, capture_output=True, text=True, errors="replace", timeout=_OPEN_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"what it made cannot be opened within {_OPEN_SECONDS} s"
    if done.returncode < 0:
        return f"what it made ends a process with {signal.Signals(-done.returncode).name}"
    return f"what it made cannot be used: {done.stderr}" if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m model.kernels.build", description=__doc__)
    parser.add_argument("--require", action="store_true", help="fail if nothing can be built")
    is_required = parser.parse_args().require
    try:
        line = build(DIRECTORY, list(compilers()))
    except NotBuilt as error:
        outcome = "" if is_required else "; products take the portable path"
        sys.stderr.write(f"kernels: not built: {error}{outcome}.\n")
        if not is_required:
            return 0
        return _EXIT_NO_COMPILER if isinstance(error, NoCompiler) else _EXIT_NOT_BUILT
    sys.stdout.write(f"kernels: {line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
