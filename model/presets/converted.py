"""The cache of converted presets: every container format ends as one safetensors file.

Life of an entry, ``<cache_dir>/presets/<key>/``: written in a hidden directory beside it, its
weights by a limited child process, each file synced, the manifest last; renamed into place in one
step; held and read any number of times; renamed away and written again if it turns out to be
damaged; removed when its source changed or nobody used it for long. There is never half an entry.
The key comes from the path, size, times and inode of the source files, so a warm start opens none
of them.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from model.config import GemmaConfig
from model.errors import PresetError, PresetFileInvalid
from model.presets.conversion_process import ConversionLimits, write_weights
from model.presets.converted_entry import (
    FORMAT_VERSION,
    TOKENIZER,
    WEIGHTS,
    DamagedEntry,
    check_entry,
    note_use,
    write_manifest,
)
from model.presets.entry_directory import (
    EntryHold,
    discard,
    hold,
    install,
    locked,
    make_private_directory,
    staging_directory,
    write_synced,
)
from model.presets.eviction import remove_stale
from model.presets.reader import PresetReader
from model.presets.regular_file import read_regular_file
from model.presets.safetensors_header import check_safetensors
from model.progress import Progress, no_progress
from model.weight_names import num_parameters, weight_specs

_MAX_TOKENIZER_BYTES = 16 << 20
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConvertedPreset:
    """A preset whose weights are one checked, memory-mapped file.

    Attributes:
        config: The architecture.
        directory: The cache entry.
        preset_digest: SHA-256 over the contents of the source files, in hexadecimal. It does not
            depend on where they are, so adapters and caches name their base model by it.
        has_tokenizer: Whether the preset is more than a backbone.
        hold: Keeps the entry as long as this object lives. Arrays may live longer: they are
            mapped, so the file's bytes stay even if its name goes.
    """

    config: GemmaConfig
    directory: Path
    preset_digest: str
    has_tokenizer: bool
    hold: EntryHold = field(repr=False, compare=False)

    def tokenizer_proto(self) -> bytes | None:
        """The SentencePiece model, or None for a preset of a backbone alone."""
        if not self.has_tokenizer:
            return None
        return read_regular_file(self.directory, TOKENIZER, _MAX_TOKENIZER_BYTES)

    def arrays(
        self, *, progress: Progress = no_progress
    ) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Name and run-time array of every weight, in the order of `weight_specs`."""
        # Not the inner iterator itself: this one keeps the hold until the last array is out.
        yield from load_arrays(self.directory / WEIGHTS, self.config, progress=progress)


def convert(
    reader: PresetReader,
    cache_dir: Path,
    *,
    progress: Progress = no_progress,
    limits: ConversionLimits | None = None,
) -> ConvertedPreset:
    """The preset of ``reader``, from the cache if it is there, else converted into it.

    Any number of processes may do this at once; whoever is first to finish writes the entry, the
    others use it.

    Args:
        reader: A `KerasPreset`, `HuggingFacePreset` or `GgufPreset`.
        cache_dir: Where converted presets are kept.
        progress: Told the bytes that are converted.
        limits: What reading the source may take; what its size explains unless given.

    Raises:
        PresetError: The source cannot be read, changed meanwhile, or the cache cannot be written.
    """
    root = cache_dir / "presets"
    try:
        make_private_directory(root)
        key = _source_key(reader.source_files)
        preset = _open_or_discard(root, key, reader.config)
        if preset is None:
            _write_entry(reader, root, key, progress, limits)
            preset = _open(root / key, key, reader.config)
    except DamagedEntry as damage:
        raise PresetError(
            f"The preset was just converted, yet {damage} Check the disk below {root}."
        ) from damage
    except OSError as error:
        raise PresetError(
            f"The preset cannot be converted in {root}: {error.strerror or error}. It needs "
            f"{4 * num_parameters(reader.config):,} bytes there."
        ) from error
    if preset is None:  # evicted at once, by a process that converted what the source is now
        raise _changed(reader)
    note_use(preset.directory)
    remove_stale(root, preset.directory, [path.resolve() for path in reader.source_files])
    return preset


def load_arrays(
    path: Path, config: GemmaConfig, *, progress: Progress = no_progress
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Name and array of every weight in a safetensors file of this model, in float32.

    Raises:
        PresetFileMissing, PresetFileInvalid: The file does not hold exactly these weights.
    """
    specs = list(weight_specs(config))
    places = check_safetensors(path, specs)
    total = 4.0 * num_parameters(config)
    done = 0.0
    # Mapped here and not by the safetensors library, whose arrays are a second copy of the file:
    # that made loading four times slower.
    file = np.memmap(path, np.uint8, mode="r")
    for spec in specs:
        place = places[spec.name]
        raw = file[place.start : place.start + place.num_bytes]
        array = raw.view(_DTYPES[place.dtype]).reshape(spec.shape).astype(np.float32, copy=False)
        done += array.nbytes
        yield spec.name, array
        progress("load", done, total)


def _source_key(source_files: tuple[Path, ...]) -> str:
    """Changes whenever a source file may have changed, judging by what costs no reading."""
    digest = hashlib.sha256(f"format {FORMAT_VERSION}\n".encode())
    for path in source_files:
        resolved = path.resolve()
        facts = resolved.stat()
        stamp = (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)
        digest.update(f"{str(resolved)!a} {stamp}\n".encode())
    return digest.hexdigest()


def _open(entry: Path, key: str, config: GemmaConfig) -> ConvertedPreset | None:
    """The entry, or None if there is none. Raises `DamagedEntry`."""
    try:
        held = hold(entry)
    except NotADirectoryError as error:
        raise DamagedEntry(f"{entry} is not a directory.") from error
    if held is None:
        return None
    try:
        facts = check_entry(entry, key, config)
    except DamagedEntry:
        held.close()
        raise
    return ConvertedPreset(config, entry, facts.preset_digest, facts.has_tokenizer, held)


def _open_or_discard(root: Path, key: str, config: GemmaConfig) -> ConvertedPreset | None:
    """The entry, or None after removing a damaged one."""
    entry = root / key
    try:
        return _open(entry, key, config)
    except DamagedEntry:
        pass
    with locked(root):
        # Another process may have replaced it since; a sound entry must not be pulled from under
        # its feet, so the decision is made again where nobody else can make it.
        try:
            return _open(entry, key, config)
        except DamagedEntry as damage:
            _logger.warning("A converted preset is thrown away and made again: %s", damage)
            discard(entry)
    return None


def _write_entry(
    reader: PresetReader,
    root: Path,
    key: str,
    progress: Progress,
    limits: ConversionLimits | None,
) -> None:
    with staging_directory(root) as staging:
        tokenizer_proto = reader.tokenizer_proto()
        if tokenizer_proto is not None:
            write_synced(staging / TOKENIZER, tokenizer_proto)
        write_weights(reader, staging / WEIGHTS, progress=progress, limits=limits)
        # Before it gets a name and a digest: what the child wrote is nothing but its claim.
        check_safetensors(staging / WEIGHTS, weight_specs(reader.config))
        write_manifest(staging, key, reader.config, reader.source_files)
        if _source_key(reader.source_files) != key:
            raise _changed(reader)
        install(staging, root / key)


def _changed(reader: PresetReader) -> PresetFileInvalid:
    return PresetFileInvalid(
        f"{reader.source_files[0].parent} changed while it was being converted; try again when "
        "its files are complete."
    )
