"""A preset as the Keras classes load it: in this process, from what a name, handle or path means.

The service converts a preset once and maps the result; a library user loads once, so here arrays go
from the checked files straight to the device.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from model.config import GemmaConfig
from model.presets import hubs
from model.presets.keras_directory import KerasPreset
from model.presets.keras_json import Preprocessing
from model.presets.keras_preprocessing import read_preprocessing
from model.presets.reader import PresetReader
from model.presets.resolve import open_reader
from model.presets.table import BUILTIN_PRESETS
from model.terminal_progress import terminal_progress
from model.weight_names import num_parameters


@dataclass(frozen=True, slots=True)
class PresetSource:
    """A preset whose config is known.

    Attributes:
        config: The architecture.
        reader: Its files; None if only the architecture of a published name was asked for.
        preprocessing: How it packs texts.
    """

    config: GemmaConfig
    reader: PresetReader | None
    preprocessing: Preprocessing

    def tokenizer_proto(self) -> bytes | None:
        """The SentencePiece model, or None if the preset has none, or no files."""
        return None if self.reader is None else self.reader.tokenizer_proto()

    def arrays(self, dtype: Any) -> dict[str, jax.Array]:
        """Name -> array on the device, of every weight; one array is held twice at a time."""
        assert self.reader is not None, "weights are asked for only where there are files"
        return dict(self._loaded(self.reader, jnp.dtype(dtype)))

    def _loaded(self, reader: PresetReader, dtype: Any) -> Iterator[tuple[str, jax.Array]]:
        total, done = float(num_parameters(self.config)), 0.0
        with terminal_progress() as progress:
            for name, array in reader.arrays():
                yield name, jnp.asarray(array, dtype).block_until_ready()
                done += array.size
                progress("load", done, total)


def open_source(preset: Any, *, load_weights: bool) -> PresetSource:
    """What ``preset`` means.

    Args:
        preset: A published name, ``kaggle://…``, ``hf://…``, a directory, or a ``.gguf`` file.
        load_weights: False needs no file of a published preset: the architecture is known. What
            was downloaded earlier is used nevertheless, so that its tokenizer is there.

    Raises:
        ValueError: Not a string.
        PresetError: There is no such preset, or it cannot be had or read.
    """
    if not isinstance(preset, str):
        raise ValueError(f"A preset must be a string, got {type(preset).__name__}.")
    cache = cache_directory()
    published = BUILTIN_PRESETS.get(preset)
    if published is not None and not load_weights and not hubs.is_cached(published.handle, cache):
        return PresetSource(published.config, None, Preprocessing())
    with terminal_progress() as progress:
        reader = open_reader(preset, cache, progress=progress)
    if isinstance(reader, KerasPreset):
        return PresetSource(reader.config, reader, read_preprocessing(reader.directory))
    return PresetSource(reader.config, reader, Preprocessing())


def cache_directory() -> Path:
    """``GEMMA_CACHE_DIR``, or its default, which the service shares."""
    if given := os.environ.get("GEMMA_CACHE_DIR"):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "gemma-service"
