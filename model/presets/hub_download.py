"""The files of one preset, on their way from a hub into one directory.

The config comes first, and what is not served is refused there; then the index of the shards,
whose names are checked before any is asked for; then the rest. A file grows as ``.<name>.part``,
which a later attempt continues, and gets its name when its size and digest are those that the hub
states.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.config import GemmaConfig
from model.errors import PresetDownloadFailed, PresetFileInvalid, PresetFileMissing
from model.presets import hf_config, hf_directory, keras_config, keras_directory
from model.presets.hub_handles import Handle
from model.presets.hub_process import HubProcess, size_of
from model.presets.transfer import Description, Problem
from model.progress import Progress
from model.weight_names import num_parameters

_CONFIG = "config.json"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_JSON_BYTES = 4 << 20
_MAX_TOKENIZER_BYTES = 16 << 20
# Weights of 4 bytes and as much again, for a vision part that is not read.
_MAX_BYTES_PER_PARAMETER = 8
_MAX_OTHER_WEIGHT_BYTES = 2 << 30
_CHUNK_BYTES = 1 << 20
# kagglehub writes by the mebibyte, so an attempt may bring something and leave nothing.
_ATTEMPTS_IN_VAIN = 3

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where one kind of preset directory has its files.

    Attributes:
        tokenizer_traces: Any of these says that there is a tokenizer, too.
        find_shards: Their names out of the index in a directory, checked.
        optional: Small files that are fetched if they are there.
    """

    tokenizer: str
    weights: str
    index: str
    tokenizer_traces: tuple[str, ...]
    find_shards: Callable[[Path], tuple[str, ...]]
    optional: tuple[str, ...] = ()


def _keras_shards(directory: Path) -> tuple[str, ...]:
    return keras_directory.find_weight_files(directory, {keras_directory.SHARD_INDEX})


_KERAS = _Layout(
    keras_directory.TOKENIZER,
    keras_directory.WEIGHTS,
    keras_directory.SHARD_INDEX,
    tokenizer_traces=("tokenizer.json", "preprocessor.json", keras_directory.TOKENIZER),
    find_shards=_keras_shards,
    optional=("tokenizer.json", "preprocessor.json", "task.json", "metadata.json"),
)
_HUGGING_FACE = _Layout(
    hf_directory.TOKENIZER,
    hf_directory.WEIGHTS,
    hf_directory.SHARD_INDEX,
    tokenizer_traces=(_CONFIG,),
    find_shards=hf_directory.find_weight_files,
)
_FIXED_NAMES = [
    _CONFIG,
    *(
        name
        for layout in (_KERAS, _HUGGING_FACE)
        for name in (layout.tokenizer, layout.weights, layout.index, *layout.optional)
    ),
]


def _ignore(num_bytes: int) -> None:
    """For a file too small to be watched."""


class Download:
    """The files of one version or commit, on their way into one directory."""

    def __init__(
        self,
        hub: HubProcess,
        handle: Handle,
        revision: str,
        directory: Path,
        progress: Progress,
    ) -> None:
        self._hub = hub
        self._handle = handle
        self._revision = revision
        self._directory = directory
        self._progress = progress
        self._described: dict[str, Description] = {}

    def run(self) -> dict[str, int]:
        """Fetches what is missing; the size of every file.

        Raises:
            Problem: The hub refuses, cannot be reached, ...
            PresetError: What it has is not served, or came damaged, or there is no room.
        """
        self._described = self._hub.describe(self._revision, _FIXED_NAMES)
        for name in _FIXED_NAMES:
            # A file of an older commit, which a reader would take for one of this commit.
            if name not in self._described:
                (self._directory / name).unlink(missing_ok=True)
        self._get(_CONFIG, _MAX_CONFIG_BYTES)
        layout, config = self._read_config()
        limits = {name: _MAX_JSON_BYTES for name in layout.optional if name in self._described}
        if any(name in self._described for name in layout.tokenizer_traces):
            self._require(layout.tokenizer)
            limits[layout.tokenizer] = _MAX_TOKENIZER_BYTES
        early = [_CONFIG]
        if layout.weights not in self._described:
            self._require(layout.index, instead_of=layout.weights)
            self._get(layout.index, _MAX_JSON_BYTES)
            early.append(layout.index)
        max_weight_bytes = (
            _MAX_BYTES_PER_PARAMETER * num_parameters(config) + _MAX_OTHER_WEIGHT_BYTES
        )
        limits |= dict.fromkeys(self._weight_files(layout), max_weight_bytes)
        self._get_all(limits)
        return {name: (self._directory / name).stat().st_size for name in (*early, *limits)}

    def _read_config(self) -> tuple[_Layout, GemmaConfig]:
        path = self._directory / _CONFIG
        if hf_config.is_hugging_face(hf_config.read_document(self._directory)):
            return _HUGGING_FACE, hf_config.read_config(path)
        return _KERAS, keras_config.read_config(path)

    def _weight_files(self, layout: _Layout) -> tuple[str, ...]:
        """Their names, described. None that was not checked gets as far as the hub."""
        if layout.weights in self._described:
            return (layout.weights,)
        names = layout.find_shards(self._directory)
        self._described |= self._hub.describe(self._revision, list(names))
        for name in names:
            self._require(name)
        return names

    def _require(self, name: str, *, instead_of: str | None = None) -> None:
        if name not in self._described:
            needed = f"neither {instead_of} nor {name}" if instead_of else f"no {name}"
            raise PresetFileMissing(
                f"{self._handle} has {needed}, so it is not a preset that is read."
            )

    def _get_all(self, limits: dict[str, int]) -> None:
        """All these files, told to ``progress`` as one."""
        missing = [name for name in limits if not self._is_here(name)]
        total = sum(self._described[name][0] for name in missing)
        self._check_room(missing)
        done = 0
        for name in missing:
            before = done

            def grown(num_bytes: int, before: int = before) -> None:
                self._progress("download", float(min(before + num_bytes, total)), float(total))

            try:
                self._get(name, limits[name], grown)
            except Problem as problem:
                if problem.kind != "disk":
                    raise
                raise self._no_room(missing) from problem
            done += self._described[name][0]
            self._progress("download", float(done), float(total))

    def _check_room(self, names: list[str]) -> None:
        if self._missing_bytes(names) > shutil.disk_usage(self._directory).free:
            raise self._no_room(names)

    def _missing_bytes(self, names: list[str]) -> int:
        parts = [path for name in names for path in (self._part(name), self._directory / name)]
        described = sum(self._described[name][0] for name in names)
        return max(0, described - sum(map(size_of, parts)))

    def _no_room(self, names: list[str]) -> PresetDownloadFailed:
        return PresetDownloadFailed(
            f"{self._handle} needs {self._missing_bytes(names):,} more bytes in {self._directory}, "
            f"where {shutil.disk_usage(self._directory).free:,} are free. Free some, or choose "
            "another cache directory; what has arrived is kept."
        )

    def _is_here(self, name: str) -> bool:
        """Whether a file with its name is the one that was described."""
        path = self._directory / name
        if not path.is_file():
            return False
        _, digest = self._described[name]
        # Kaggle states digests with the files only, but a version never changes and a file got
        # its name after its digest was compared.
        return digest is None or _mismatch(path, None, digest) is None

    def _part(self, name: str) -> Path:
        _, digest = self._described[name]
        path = self._directory / name
        # What another commit has under this name is not continued.
        tag = digest.split(":")[1][:16] + "." if digest else ""
        return path.with_name(f".{path.name}.{tag}part")

    def _get(self, name: str, max_bytes: int, grown: Callable[[int], None] = _ignore) -> None:
        """One file, under its name once its size and digest are right."""
        self._require(name)
        if self._is_here(name):
            return
        num_bytes, _ = self._described[name]
        self._check_size(name, num_bytes, max_bytes)
        part = self._part(name)
        part.parent.mkdir(parents=True, exist_ok=True)
        if size_of(part) > num_bytes:
            part.unlink()
        fault = self._get_part(name, part, max_bytes, grown)
        if fault is not None:
            # Perhaps the first piece was damaged long ago, so once more from the beginning.
            _logger.warning("%s of %s is damaged (%s); trying again", name, self._handle, fault)
            part.unlink(missing_ok=True)
            fault = self._get_part(name, part, max_bytes, grown)
        if fault is not None:
            part.unlink(missing_ok=True)
            raise PresetDownloadFailed(
                f"{name} of {self._handle} arrived damaged twice: {fault}. Try again later."
            )
        if size_of(part) > max_bytes:
            # The hub described another size, and it all came before anybody looked.
            num_bytes = size_of(part)
            part.unlink()
            self._check_size(name, num_bytes, max_bytes)
        synced(part)
        part.replace(self._directory / name)

    def _check_size(self, name: str, num_bytes: int, max_bytes: int) -> None:
        if num_bytes > max_bytes:
            raise PresetFileInvalid(
                f"{name} of {self._handle} has {num_bytes:,} bytes; at most {max_bytes:,} are read."
            )

    def _get_part(
        self, name: str, part: Path, max_bytes: int, grown: Callable[[int], None]
    ) -> str | None:
        """Transfers, and goes on whenever it is interrupted, until nothing arrives repeatedly.

        Returns:
            What is wrong with the file, or None.
        """
        num_bytes, digest = self._described[name]
        in_vain = 0
        while True:
            before = size_of(part)
            try:
                answer = self._hub.get(self._revision, name, part, num_bytes, max_bytes, grown)
            except Problem as problem:
                arrived = size_of(part)
                in_vain = 0 if arrived > before else in_vain + 1
                if problem.kind != "interrupted" or in_vain == _ATTEMPTS_IN_VAIN:
                    raise
                if digest is not None and arrived > num_bytes:
                    return f"it has more than {num_bytes:,} bytes"
                continue
            stated_bytes, stated_digest = answer
            if digest is not None:
                return _mismatch(part, num_bytes, digest)
            return _mismatch(part, stated_bytes, stated_digest)


def _mismatch(path: Path, num_bytes: int | None, digest: str | None) -> str | None:
    """How the file differs from what a hub states of it, or None."""
    if not path.is_file():
        return "its digest is another one"
    found_bytes = path.stat().st_size
    if num_bytes is not None and found_bytes != num_bytes:
        return f"it has {found_bytes:,} bytes instead of {num_bytes:,}"
    if digest is None:
        return None
    kind, expected = digest.split(":")
    # Not against forgery: Kaggle states no other digest than MD5.
    hashes = {"sha256": hashlib.sha256, "md5": hashlib.md5, "git": hashlib.sha1}
    found = hashes[kind](f"blob {found_bytes}\0".encode() if kind == "git" else b"")
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    if found.hexdigest() != expected:
        return f"its {kind} digest is {found.hexdigest()} instead of {expected}"
    return None


def synced(path: Path) -> None:
    """Waits until the file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
