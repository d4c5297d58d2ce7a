"""What is inside one entry of the cache of converted presets, and how damage to it is noticed.

The manifest, preset.json, holds the config, the places of the source files, the SHA-256 and size
of every file, source and written, and its own SHA-256. A changed bit anywhere is noticed before
the entry is used. Its time of modification says when the entry was last used.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.config import GemmaConfig
from model.errors import PresetError
from model.presets.entry_directory import write_synced
from model.presets.regular_file import open_regular_file, read_regular_file
from model.presets.safetensors_header import check_safetensors
from model.presets.strict_json import parse_object
from model.weight_names import weight_specs

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.spm"
MANIFEST = "preset.json"

# Raise it when the same source files would be converted to something else. It is part of the key.
FORMAT_VERSION = 2

_MAX_MANIFEST_BYTES = 1 << 20


class DamagedEntry(Exception):
    """The entry is not what its manifest says. The message ends in a full stop."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file by its content. The name is for people to read."""

    name: str
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "SourceFile":
        with open_regular_file(path.parent, path.name) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(path.name, file.tell(), sha256)


@dataclass(frozen=True, slots=True)
class EntryFacts:
    """What a sound entry says about itself.

    Attributes:
        preset_digest: See `preset_digest`.
        has_tokenizer: Whether it holds one.
    """

    preset_digest: str
    has_tokenizer: bool


def preset_digest(sources: Sequence[SourceFile]) -> str:
    """Names a preset by the contents of its source files, wherever they are."""
    return hashlib.sha256("\n".join(source.sha256 for source in sources).encode()).hexdigest()


def write_manifest(
    directory: Path, key: str, config: GemmaConfig, source_files: Sequence[Path]
) -> None:
    """Describes and seals the weights in ``directory``, and the tokenizer if there is one.

    Raises:
        PresetError, OSError: A file, source or written, cannot be read.
    """
    sources = [SourceFile.of(path) for path in source_files]
    names = [WEIGHTS, TOKENIZER] if (directory / TOKENIZER).exists() else [WEIGHTS]
    content = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "config": dataclasses.asdict(config),
        "preset_digest": preset_digest(sources),
        "sources": [dataclasses.asdict(source) for source in sources],
        "source_paths": [str(path.resolve()) for path in source_files],
        "files": _describe_files(directory, names),
    }
    sealed = {"sha256": _seal(content), "content": content}
    write_synced(directory / MANIFEST, json.dumps(sealed, indent=2).encode())


def check_entry(directory: Path, key: str, config: GemmaConfig) -> EntryFacts:
    """What an entry says about itself, having checked that it is sound.

    Raises:
        DamagedEntry: Anything else is the case.
    """
    try:
        content = _manifest(directory)
        # After an upgrade the same config.json may be understood differently.
        same_config = content.get("config") == json.loads(json.dumps(dataclasses.asdict(config)))
        if content.get("key") != key or not same_config:
            raise DamagedEntry(f"{directory / MANIFEST} describes another preset.")
        # Headers first: a truncated file is noticed without reading it whole.
        check_safetensors(directory / WEIGHTS, weight_specs(config))
        files = content.get("files")
        has_tokenizer = isinstance(files, list) and len(files) == 2
        names = [WEIGHTS, TOKENIZER] if has_tokenizer else [WEIGHTS]
        if files != _describe_files(directory, names):
            raise DamagedEntry(f"a file in {directory} is not what its manifest says.")
        return EntryFacts(str(content.get("preset_digest")), has_tokenizer)
    except (PresetError, OSError) as error:
        raise DamagedEntry(str(error)) from error


def source_paths(directory: Path) -> set[str]:
    """Where the files were that the entry was made from; none if its manifest does not say."""
    try:
        paths = _manifest(directory).get("source_paths")
    except (DamagedEntry, PresetError, OSError):
        return set()
    return set(map(str, paths)) if isinstance(paths, list) else set()


def note_use(directory: Path) -> None:
    """Puts off the day on which the entry is removed because nobody uses it."""
    with contextlib.suppress(OSError):
        os.utime(directory / MANIFEST)


def _manifest(directory: Path) -> dict[str, object]:
    """The sealed content of the manifest. Raises DamagedEntry, PresetError or OSError."""
    raw = read_regular_file(directory, MANIFEST, _MAX_MANIFEST_BYTES)
    document = parse_object(raw, str(directory / MANIFEST))
    content = document.get("content")
    if not isinstance(content, dict) or document.get("sha256") != _seal(content):
        raise DamagedEntry(f"{directory / MANIFEST} has been changed.")
    return content


def _describe_files(directory: Path, names: Sequence[str]) -> list[dict[str, object]]:
    return [dataclasses.asdict(SourceFile.of(directory / name)) for name in names]


def _seal(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
