"""Adapter files by where they lie: read into an adapter, written from one.

Three kinds are read, and a fourth that is ours::

    NAME.lora.h5            keras-hub's                   model.adapter_exchange.keras_file
    a directory             PEFT's                        model.adapter_exchange.peft_file
    NAME.safetensors        PEFT's, in one file
    NAME.safetensors        this service's                model.adapter_file
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from model.adapter_exchange.keras_file import SUFFIX, adapter_of, write_keras_file
from model.adapter_exchange.keras_process import read_elsewhere
from model.adapter_exchange.layouts import in_layout
from model.adapter_exchange.peft_config import parse_config, parse_metadata
from model.adapter_exchange.peft_file import (
    CONFIG,
    WEIGHTS,
    peft_file,
    read_peft,
    write_peft_directory,
)
from model.adapter_file import is_adapter_file, read_adapter
from model.adapter_shapes import MAX_RANK, bank_bytes
from model.config import GemmaConfig
from model.errors import AdapterUnfit
from model.lora_adapter import Layout, LoraAdapter
from model.presets.entry_directory import write_synced
from model.presets.regular_file import read_regular_file
from model.presets.safetensors_header import header_of

_SAFETENSORS = ".safetensors"
_MAX_CONFIG_BYTES = 1 << 20
# What a file has beside its numbers.
_HEADER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, eq=False)
class AdapterContent:
    """The bytes of an adapter's files, not understood yet.

    Attributes:
        path: Where they lie.
        config: Of ``adapter_config.json``; None where there is one file only.
        weights: Of the other file.
    """

    path: Path
    config: bytes | None
    weights: bytes

    @property
    def digest(self) -> str:
        """``sha256:`` and that of the bytes, of two files one behind the other."""
        digest = hashlib.sha256(self.config or b"")
        digest.update(self.weights)
        return f"sha256:{digest.hexdigest()}"


def read_content(path: Path, config: GemmaConfig) -> AdapterContent:
    """What lies at a path, read whole.

    Raises:
        PresetFileMissing: Nothing does.
        PresetFileInvalid: It is no plain file, or larger than any adapter of the model.
    """
    most = _max_bytes(config)
    if path.is_dir():
        fields = read_regular_file(path, CONFIG, _MAX_CONFIG_BYTES)
        return AdapterContent(path, fields, read_regular_file(path, WEIGHTS, most))
    return AdapterContent(path, None, read_regular_file(path.parent, path.name, most))


def understand(content: AdapterContent, config: GemmaConfig) -> LoraAdapter:
    """The adapter in files of any kind; their names say which.

    Raises:
        PresetFileInvalid: It is none, or does not fit the model.
        AdapterUnfit: It is of a kind that is not served, or a number in it is not finite.
    """
    name = content.path.name
    if content.config is None and name.endswith(SUFFIX):
        return _understand_keras(content, config)
    if content.config is None and not name.endswith(_SAFETENSORS):
        raise AdapterUnfit(
            f"{content.path}: an adapter is a directory of PEFT, or a file whose name ends in "
            f"{SUFFIX} or {_SAFETENSORS}."
        )
    if content.config is None and is_adapter_file(content.weights):
        return read_adapter(content.weights, config)
    return _understand_peft(content, config)


def open_adapter(path: Path, config: GemmaConfig) -> LoraAdapter:
    """The adapter at a path, of any kind.

    Raises:
        PresetError: As `read_content` and `understand`.
    """
    return understand(read_content(path, config), config)


def import_adapter(path: Path, layout: Layout, config: GemmaConfig) -> LoraAdapter:
    """The adapter in a file, whatever its name, of keras-hub or of PEFT; or in PEFT's directory.

    Raises:
        PresetError: As `read_content` and `understand`.
    """
    content = read_content(path, config)
    if layout == "keras":
        return _understand_keras(content, config)
    return _understand_peft(content, config)


def export_file(adapter: LoraAdapter, path: Path, layout: Layout, config: GemmaConfig) -> None:
    """Writes one new file for keras-hub, or one with PEFT's tensors and config.

    Raises:
        AdapterUnfit: It would have a larger rank than a file may have.
        OSError: It cannot be written.
    """
    own = in_layout(adapter, layout, config)
    if layout == "keras":
        write_keras_file(path, own, config)
    else:
        write_synced(path, peft_file(own, config))


def export_directory(adapter: LoraAdapter, path: Path, config: GemmaConfig) -> None:
    """Makes a directory that PEFT loads.

    Raises:
        AdapterUnfit: It would have a larger rank than a file may have.
        PresetError: There is something already, or the disk refuses.
    """
    write_peft_directory(path, in_layout(adapter, "peft", config), config)


def _understand_keras(content: AdapterContent, config: GemmaConfig) -> LoraAdapter:
    source = str(content.path)
    return adapter_of(read_elsewhere(content.weights, source), config, source)


def _understand_peft(content: AdapterContent, config: GemmaConfig) -> LoraAdapter:
    source = str(content.path)
    header = header_of(content.weights, source)
    if content.config is None:
        fields = parse_metadata(header.metadata, source)
    else:
        fields = parse_config(content.config, f"{content.path / CONFIG}")
    return read_peft(content.weights, header, fields, config)


def _max_bytes(config: GemmaConfig) -> int:
    return _HEADER_BYTES + bank_bytes(config, 1, MAX_RANK)
