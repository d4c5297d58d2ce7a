"""A Hugging Face directory of a Gemma 1, Gemma 2 or Gemma 3 text model.

Used are config.json, the weights (model.safetensors, or model.safetensors.index.json and the
shards that it names) and tokenizer.model. A directory without any file of a tokenizer holds a
backbone alone.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from model.config import GemmaConfig
from model.errors import PresetFileInvalid, PresetFileMissing, PresetNotFound
from model.presets.hf_config import CONFIG_NAME, read_config
from model.presets.hf_layout import EMBEDDINGS_TENSOR, HEAD_BY_PREFIX, find_prefix, tensor_names
from model.presets.preset_directory import read_tokenizer, shard_names
from model.presets.regular_file import (
    open_regular_file,
    require_regular_file,
)
from model.presets.safetensors_header import (
    SafetensorsHeader,
    TensorPlace,
    check_tensors,
    read_header,
)
from model.weight_names import WeightSpec, weight_specs

TOKENIZER = "tokenizer.model"
WEIGHTS = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
# Any of these says that the model was saved with a tokenizer.
_TOKENIZER_TRACES = {
    TOKENIZER,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
}

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\.safetensors")
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True, slots=True)
class HuggingFacePreset:
    """A `PresetReader` of a Hugging Face directory. Make one with `open`.

    Attributes:
        directory: Without links in its path.
        config: The architecture.
        weight_files: One, or all shards.
        has_tokenizer: False for a backbone alone.
    """

    directory: Path
    config: GemmaConfig
    weight_files: tuple[str, ...]
    has_tokenizer: bool

    @classmethod
    def open(cls, directory: Path) -> "HuggingFacePreset":
        """Reads the config and finds the weights. Opens no weights file.

        Raises:
            PresetNotFound: Not a directory.
            PresetFileMissing: It lacks a file.
            PresetFileInvalid: The config or the shard index is malformed.
            UnsupportedPreset: The config describes something that is not served.
        """
        if not directory.is_dir():
            raise PresetNotFound(f"{directory} is not a directory.")
        directory = directory.resolve()
        config = read_config(directory / CONFIG_NAME)
        weight_files = find_weight_files(directory)
        names = {entry.name for entry in directory.iterdir()}
        has_tokenizer = not names.isdisjoint(_TOKENIZER_TRACES)
        for name in (*weight_files, TOKENIZER) if has_tokenizer else weight_files:
            require_regular_file(directory, name)
        return cls(directory, config, weight_files, has_tokenizer)

    @property
    def source_files(self) -> tuple[Path, ...]:
        """All files that decide the model or the tokenizer."""
        names = (CONFIG_NAME, *self.weight_files, *((TOKENIZER,) if self.has_tokenizer else ()))
        return tuple(self.directory / name for name in names)

    def tokenizer_proto(self) -> bytes | None:
        """The SentencePiece model, with as many pieces as the vocabulary has rows, if any."""
        if not self.has_tokenizer:
            return None
        return read_tokenizer(
            self.directory,
            TOKENIZER,
            vocabulary_size=self.config.vocabulary_size,
            size_field="vocab_size",
        )

    def arrays(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Name and run-time array of every weight, in the order of `weight_specs`.

        Raises:
            PresetFileMissing: A file is not there any more.
            PresetFileInvalid: The files do not hold exactly the tensors of the config.
        """
        headers = [read_header(self.directory / name) for name in self.weight_files]
        prefix = _prefix(headers)
        names = tensor_names(self.config, prefix)
        shapes = {names[spec.name]: spec.shape for spec in weight_specs(self.config)}
        found = _find_tensors(headers, shapes, HEAD_BY_PREFIX[prefix])
        with ExitStack() as stack:
            files = {
                header.source: stack.enter_context(open_regular_file(self.directory, name))
                for name, header in zip(self.weight_files, headers, strict=True)
            }
            for spec in weight_specs(self.config):
                source, place = found[names[spec.name]]
                yield spec.name, _read(files[source], source, place, spec)


def find_weight_files(directory: Path) -> tuple[str, ...]:
    """The one weights file, or the shards that the index names, whether they are there or not."""
    names = {entry.name for entry in directory.iterdir()}
    if WEIGHTS in names:
        return (WEIGHTS,)
    if SHARD_INDEX in names:
        return shard_names(
            directory, SHARD_INDEX, pattern=_SHARD_NAME, example="model-00001-of-00002.safetensors"
        )
    raise PresetFileMissing(
        f"{directory} has neither {WEIGHTS} nor {SHARD_INDEX}. Other formats, such as "
        "pytorch_model.bin, can hold code and are not read."
    )


def _prefix(headers: list[SafetensorsHeader]) -> str:
    prefix = find_prefix(name for header in headers for name in header.entries)
    if prefix is None:
        raise PresetFileInvalid(
            f"{headers[0].source}: tensor model.{EMBEDDINGS_TENSOR} is missing; the other names "
            "that it can have are missing, too."
        )
    return prefix


def _find_tensors(
    headers: list[SafetensorsHeader], shapes: dict[str, tuple[int, ...]], head: str
) -> dict[str, tuple[str, TensorPlace]]:
    """Where each tensor of ``shapes`` is; there is nothing else but a copy of the embeddings.

    Output heads are tied to the embeddings (the config was refused otherwise), so a stored one
    is not read.
    """
    optional = {head: next(iter(shapes.values()))}
    file_of: dict[str, str] = {}
    for header in headers:
        for name in header.entries:
            if name in file_of:
                raise PresetFileInvalid(
                    f"{header.source}: tensor {name!r:.80} is also in {Path(file_of[name]).name}."
                )
            file_of[name] = header.source
    for name in shapes:
        if name not in file_of:
            raise PresetFileInvalid(f"{headers[0].source}: tensor {name} is missing.")
    found: dict[str, tuple[str, TensorPlace]] = {}
    for header in headers:
        here = {
            name: shape
            for name, shape in (shapes | optional).items()
            if file_of.get(name) == header.source
        }
        for name, place in check_tensors(header, here).items():
            found[name] = (header.source, place)
    return found


def _read(
    file: BufferedReader, source: str, place: TensorPlace, spec: WeightSpec
) -> NDArray[np.float32]:
    stored = np.empty(spec.shape, dtype=_DTYPES[place.dtype])
    file.seek(place.start)
    # Read, not mapped: a file that shrinks meanwhile is an error here and a crash there.
    if file.readinto(stored.reshape(-1).view(np.uint8).data) != place.num_bytes:
        raise PresetFileInvalid(f"{source} became shorter while it was being read.")
    return stored.astype(np.float32, copy=False)
