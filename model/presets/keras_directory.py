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
from numpy.typing import NDArray

from model.config import GemmaConfig
from model.errors import PresetFileMissing, PresetNotFound
from model.presets.hdf5_weights import read_hdf5_arrays
from model.presets.keras_config import read_config
from model.presets.preset_directory import read_tokenizer, shard_names
from model.presets.regular_file import require_regular_file

_CONFIG = "config.json"
_TOKENIZER = "assets/tokenizer/vocabulary.spm"
_WEIGHTS = "model.weights.h5"
_SHARD_INDEX = "model.weights.json"

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
        return read_tokenizer(
            self.directory,
            _TOKENIZER,
            vocabulary_size=self.config.vocabulary_size,
            size_field="vocabulary_size",
        )

    def arrays(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Name and run-time array of every weight, in the order of `weight_specs`."""
        return read_hdf5_arrays(self.directory, self.weight_files, self.config)


def _find_weight_files(directory: Path) -> tuple[str, ...]:
    names = {entry.name for entry in directory.iterdir()}
    if _WEIGHTS in names:
        return (_WEIGHTS,)
    if _SHARD_INDEX in names:
        return shard_names(
            directory,
            _SHARD_INDEX,
            pattern=_SHARD_NAME,
            example="model_00000.weights.h5",
            lists_allowed=True,
        )
    raise PresetFileMissing(f"{directory} has neither {_WEIGHTS} nor {_SHARD_INDEX}.")
