"""Writes a model as a Keras preset directory, as keras-hub's ``save_to_preset`` does.

HDF5 paths and shapes come from `keras_layout`. Beside the weights a file has an empty group for
every layer, with the layer's name: readers do without, but people and tools look at them.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from model.config import GemmaConfig
from model.gemma.weights import EMBEDDINGS
from model.presets.entry_directory import write_synced
from model.presets.keras_config import read_config
from model.presets.keras_json import backbone_name, preset_files
from model.presets.keras_layout import KerasDataset, keras_datasets
from model.presets.written_preset import NamedArray, in_order, new_directory, refuse_if_lost

_WEIGHTS = "model.weights.h5"
_SHARD_INDEX = "model.weights.json"
_TOKENIZER = "assets/tokenizer/vocabulary.spm"

# The last part of a group's path -> the name of the layer, where the two differ.
_LAYER_NAMES = {
    "reversible_embedding": "token_embedding",
    "rms_normalization": "final_normalization",
    "query_dense": "query",
    "key_dense": "key",
    "value_dense": "value",
    "output_dense": "attention_output",
    "gating_ffw": "ffw_gating",
    "gating_ffw_2": "ffw_gating_2",
}
# Layers of a block without weights. Keras counts each kind through the model.
_BARE_LAYERS = {
    "attention/dropout_layer": "dropout",
    "attention/rope_layer": "rotary_embedding",
    "attention/softmax": "softmax",
}


def write_keras_preset(
    directory: Path,
    config: GemmaConfig,
    arrays: Iterable[NamedArray],
    tokenizer_proto: bytes,
    *,
    sequence_length: int = 1024,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes ``directory``, which must not exist, whole or not at all. Weights are float32.

    Args:
        directory: What is made.
        config: The architecture.
        arrays: Name and array of every weight, in the order of `weight_specs`.
        tokenizer_proto: The SentencePiece model.
        sequence_length: To which keras-hub's preprocessor pads and truncates by default.
        max_shard_bytes: Of weights in one file. A larger model is split and gets an index; a
            larger array has a file of its own. None never splits.

    Raises:
        UnsupportedPreset: The format cannot express the config.
        PresetError: The directory exists, or cannot be written.
    """
    with new_directory(directory) as staging:
        for name, document in preset_files(config, sequence_length=sequence_length).items():
            _write_json(staging / name, document)
        # A Keras preset does not state its context.
        read_back = read_config(staging / "config.json")
        refuse_if_lost(config, read_back, "A Keras preset", may_differ={"context_tokens"})
        (staging / _TOKENIZER).parent.mkdir(parents=True)
        write_synced(staging / _TOKENIZER, tokenizer_proto)
        file_of = _plan(config, max_shard_bytes)
        if len(set(file_of.values())) > 1:
            _write_json(staging / _SHARD_INDEX, _index_json(config, file_of))
        _write_weights(staging, config, arrays, file_of)


def _plan(config: GemmaConfig, max_shard_bytes: int | None) -> dict[str, str]:
    """Path of each dataset -> its file, in the order in which Keras walks through a model."""
    datasets = [dataset for block in _blocks(config) for dataset in block]
    if max_shard_bytes is None or sum(map(_num_bytes, datasets)) <= max_shard_bytes:
        return {dataset.path: _WEIGHTS for dataset in datasets}
    file_of: dict[str, str] = {}
    shard, shard_bytes = 0, 0
    for dataset in datasets:
        if shard_bytes and shard_bytes + _num_bytes(dataset) > max_shard_bytes:
            shard, shard_bytes = shard + 1, 0
        file_of[dataset.path] = f"model_{shard:05d}.weights.h5"
        shard_bytes += _num_bytes(dataset)
    return file_of


def _blocks(config: GemmaConfig) -> Iterator[list[KerasDataset]]:
    """Datasets by the layer of the model that they belong to; Keras walks a block by name."""
    for _, block in itertools.groupby(keras_datasets(config), key=_top_group):
        yield sorted(block, key=lambda dataset: dataset.path)


def _top_group(dataset: KerasDataset) -> str:
    return "/".join(dataset.path.split("/", 2)[:2])


def _num_bytes(dataset: KerasDataset) -> int:
    return 4 * int(np.prod(dataset.shape, dtype=np.int64))


def _index_json(config: GemmaConfig, file_of: dict[str, str]) -> dict[str, object]:
    total = sum(map(_num_bytes, keras_datasets(config)))
    places = {f"/{path.removesuffix('/0')}": name for path, name in file_of.items()}
    return {"metadata": {"total_size": float(total)}, "weight_map": places}


def _write_weights(
    directory: Path, config: GemmaConfig, arrays: Iterable[NamedArray], file_of: dict[str, str]
) -> None:
    source = in_order(config, arrays)
    file: h5py.File | None = None
    try:
        for number, block in enumerate(_blocks(config)):
            # One block is in memory at a time: Keras' order within it is another than ours.
            held = dict(next(source) for _ in block)
            for dataset in block:
                path = directory / file_of[dataset.path]
                if file is None or Path(file.filename) != path:
                    if file is not None:
                        _close_synced(file)
                    file = h5py.File(path, "x")
                    if number == 0:
                        _name_model(file, config)
                if dataset is block[0] and dataset.name != EMBEDDINGS and len(block) > 1:
                    _name_block(file, _top_group(dataset), number - 1)
                file[dataset.path] = _to_file(dataset, held.pop(dataset.name))
                _name(file, dataset.path.removesuffix("/vars/0"))
        # Ends the check of the order: there must be no further array.
        assert next(source, None) is None
    finally:
        if file is not None:
            _close_synced(file)


def _close_synced(file: h5py.File) -> None:
    path = Path(file.filename)
    file.close()
    path.chmod(0o600)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name_model(file: h5py.File, config: GemmaConfig) -> None:
    _name(file, "", backbone_name(config))
    _name(file, "layers/input_layer", "token_ids")
    _name(file, "layers/input_layer_1", "padding_mask")


def _name_block(file: h5py.File, group: str, layer: int) -> None:
    _name(file, group, f"decoder_block_{layer}")
    _name(file, f"{group}/attention", "attention")
    for path, kind in _BARE_LAYERS.items():
        _name(file, f"{group}/{path}", f"{kind}_{layer}" if layer else kind)


def _name(file: h5py.File, group: str, name: str | None = None) -> None:
    last = group.rpartition("/")[2]
    file.require_group(f"{group}/vars").attrs["name"] = name or _LAYER_NAMES.get(last, last)


def _to_file(dataset: KerasDataset, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of `keras_layout.to_run_time`."""
    if dataset.name == EMBEDDINGS or array.ndim == 1:
        return array
    if dataset.name.endswith("/attention_output/kernel"):
        return array.T.reshape(dataset.shape)  # [D, N·H] -> [N, H, D]
    if len(dataset.shape) == 3:
        heads, width, head_dim = dataset.shape
        return array.reshape(heads, head_dim, width).swapaxes(1, 2)  # [N·H, D] -> [N, D, H]
    return array.T


def _write_json(path: Path, document: dict[str, object]) -> None:
    write_synced(path, json.dumps(document, indent=4).encode())
