"""A Keras preset directory, as keras-hub's ``save_to_preset`` writes it.

Used are config.json, the weights (model.weights.h5, or model.weights.json and the shards that it
names) and assets/tokenizer/vocabulary.spm. The other files configure Keras objects that are not
built here.

A backbone saved alone, or a task without a preprocessor, has no tokenizer: neither its files nor
those that configure it.
"""

import re
from collections.abc import Iterator, Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.config import GemmaConfig
from model.errors import PresetFileMissing, PresetNotFound
from model.presets.hdf5_weights import read_hdf5_arrays
from model.presets.keras_config import read_stored_model
from model.presets.preset_directory import read_tokenizer, shard_names
from model.presets.regular_file import require_regular_file

_CONFIG = "config.json"
TOKENIZER = "assets/tokenizer/vocabulary.spm"
# Any of these says that the preset was saved with a tokenizer.
_TOKENIZER_TRACES = {"tokenizer.json", "preprocessor.json", "assets"}
WEIGHTS = "model.weights.h5"
SHARD_INDEX = "model.weights.json"

_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\.weights\.h5")


@dataclass(frozen=True, slots=True)
class KerasPreset:
    """A `PresetReader` of a Keras preset directory. Make one with `open`.

    Attributes:
        directory: Without links in its path.
        config: The architecture.
        int8_weights: Names of the arrays that are stored as integers with scales.
        weight_files: One, or all shards.
        has_tokenizer: False for a backbone alone.
    """

    directory: Path
    config: GemmaConfig
    int8_weights: frozenset[str]
    weight_files: tuple[str, ...]
    has_tokenizer: bool

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
        stored = read_stored_model(directory / _CONFIG)
        names = {entry.name for entry in directory.iterdir()}
        weight_files = find_weight_files(directory, names)
        has_tokenizer = not names.isdisjoint(_TOKENIZER_TRACES)
        for name in (*weight_files, TOKENIZER) if has_tokenizer else weight_files:
            require_regular_file(directory, name)
        return cls(directory, stored.config, stored.int8_weights, weight_files, has_tokenizer)

    @property
    def source_files(self) -> tuple[Path, ...]:
        """All files that decide the model or the tokenizer."""
        names = (_CONFIG, *self.weight_files, *((TOKENIZER,) if self.has_tokenizer else ()))
        return tuple(self.directory / name for name in names)

    def tokenizer_proto(self) -> bytes | None:
        """The SentencePiece model, with as many pieces as the vocabulary has rows, if any."""
        if not self.has_tokenizer:
            return None
        return read_tokenizer(
            self.directory,
            TOKENIZER,
            vocabulary_size=self.config.vocabulary_size,
            size_field="vocabulary_size",
        )

    def arrays(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Name and run-time array of every weight, in the order of `weight_specs`."""
        return read_hdf5_arrays(self.directory, self.weight_files, self.config, self.int8_weights)


def find_weight_files(directory: Path, names: AbstractSet[str]) -> tuple[str, ...]:
    """The one weights file, or the shards that the index names, whether they are there or not.

    Args:
        directory: The preset.
        names: Of the files in it.
    """
    if WEIGHTS in names:
        return (WEIGHTS,)
    if SHARD_INDEX in names:
        return shard_names(
            directory,
            SHARD_INDEX,
            pattern=_SHARD_NAME,
            example="model_00000.weights.h5",
            lists_allowed=True,
        )
    raise PresetFileMissing(f"{directory} has neither {WEIGHTS} nor {SHARD_INDEX}.")
