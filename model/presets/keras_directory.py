"""A Keras preset directory, as keras-hub's ``save_to_preset`` writes it.

Used are config.json, the weights (model.weights.h5, or model.weights.json and the shards that it
names) and assets/tokenizer/vocabulary.spm. The other files configure Keras objects that are not
built here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from model.config import GemmaConfig
from model.errors import PresetFileInvalid, PresetFileMissing, PresetNotFound
from model.presets.hdf5_weights import read_hdf5_arrays
from model.presets.keras_config import read_config
from model.presets.regular_file import read_regular_file, require_regular_file
from model.presets.strict_json import parse_object

_CONFIG = "config.json"
_TOKENIZER = "assets/tokenizer/vocabulary.spm"
_WEIGHTS = "model.weights.h5"
_SHARD_INDEX = "model.weights.json"

_MAX_TOKENIZER_BYTES = 16 << 20
_MAX_INDEX_BYTES = 4 << 20
_MAX_SHARDS = 1_000
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\.weights\.h5")


@dataclass(frozen=True, slots=True)
class KerasPreset:
    """A `PresetReader` of a Keras preset directory. Make one with `open`."""

    directory: Path
    config: GemmaConfig
    weight_files: tuple[str, ...]

    @classmethod
    def open(cls, directory: Path) -> "KerasPreset":
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
        config = read_config(directory / _CONFIG)
        weight_files = _find_weight_files(directory)
        for name in (*weight_files, _TOKENIZER):
            require_regular_file(directory, name)
        return cls(directory, config, weight_files)

    @property
    def source_files(self) -> tuple[Path, ...]:
        """All files that decide the model or the tokenizer."""
        return tuple(self.directory / name for name in (_CONFIG, *self.weight_files, _TOKENIZER))

    def tokenizer_proto(self) -> bytes:
        """The SentencePiece model, with as many pieces as the vocabulary has rows."""
        path = self.directory / _TOKENIZER
        proto = read_regular_file(self.directory, _TOKENIZER, _MAX_TOKENIZER_BYTES)
        try:
            num_pieces = sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size()
        except (RuntimeError, OSError, ValueError) as error:
            raise PresetFileInvalid(f"{path} is not a SentencePiece model.") from error
        if num_pieces != self.config.vocabulary_size:
            raise PresetFileInvalid(
                f"{path} has {num_pieces} pieces but vocabulary_size in config.json is "
                f"{self.config.vocabulary_size}."
            )
        return proto

    def arrays(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Name and run-time array of every weight, in the order of `weight_specs`."""
        return read_hdf5_arrays(self.directory, self.weight_files, self.config)


def _find_weight_files(directory: Path) -> tuple[str, ...]:
    names = {entry.name for entry in directory.iterdir()}
    if _WEIGHTS in names:
        return (_WEIGHTS,)
    if _SHARD_INDEX in names:
        return _shard_names(directory)
    raise PresetFileMissing(f"{directory} has neither {_WEIGHTS} nor {_SHARD_INDEX}.")


def _shard_names(directory: Path) -> tuple[str, ...]:
    """The shards that the index names. Which weight is in which one, the shards say themselves."""
    path = directory / _SHARD_INDEX
    index = parse_object(read_regular_file(directory, _SHARD_INDEX, _MAX_INDEX_BYTES), str(path))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PresetFileInvalid(f'{path}: "weight_map" must map names to files.')
    names: set[str] = set()
    for value in weight_map.values():
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
                raise PresetFileInvalid(
                    f"{path}: {name!r:.80} is not the name of a shard such as "
                    "model_00000.weights.h5."
                )
            names.add(name)
    if not 1 <= len(names) <= _MAX_SHARDS:
        raise PresetFileInvalid(
            f"{path} names {len(names)} shards; at most {_MAX_SHARDS} are read."
        )
    return tuple(sorted(names))
