"""Writes a model as a Keras preset directory, as keras-hub's ``save_to_preset`` does.

HDF5 paths and shapes come from `keras_layout`. Beside the weights a file has an empty group for
every layer, with the layer's name: readers do without, but people and tools look at them.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import h5py
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from model.config import GemmaConfig
from model.presets.entry_directory import write_synced
from model.presets.keras_config import read_config
from model.presets.keras_json import Preprocessing, backbone_name, preset_files
from model.presets.keras_layout import KerasDataset, keras_datasets
from model.presets.written_preset import NamedArray, in_order, new_directory, refuse_if_lost
from model.weight_names import EMBEDDINGS

FloatName = Literal["float32", "bfloat16"]
_ITEM_BYTES: dict[FloatName, int] = {"float32": 4, "bfloat16": 2}

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
    tokenizer_proto: bytes | None,
    *,
    preprocessing: Preprocessing | None = None,
    dtype: FloatName = "float32",
    max_shard_bytes: int | None = None,
) -> None:
    """Writes ``directory``, which must not exist, whole or not at all.

    Args:
        directory: What is made.
        config: The architecture.
        arrays: Name and array of every weight, in the order of `weight_specs`.
        tokenizer_proto: The SentencePiece model; None writes a model without a tokenizer.
        preprocessing: Of texts; keras-hub's defaults if left out.
        dtype: Of the stored weights.
        max_shard_bytes: Of weights in one file. A larger model is split and gets an index; a
            larger array has a file of its own. None never splits.

    Raises:
        UnsupportedPreset: The format cannot express the config.
        PresetError: The directory exists, or cannot be written.
    """
    with new_directory(directory) as staging:
        has_texts = tokenizer_proto is not None
        packing = (preprocessing or Preprocessing()) if has_texts else None
        for name, document in preset_files(config, dtype, packing).items():
            _write_json(staging / name, document)
        # A Keras preset does not state its context.
        read_back = read_config(staging / "config.json")
        refuse_if_lost(config, read_back, "A Keras preset", may_differ={"context_tokens"})
        if tokenizer_proto is not None:
            (staging / _TOKENIZER).parent.mkdir(parents=True)
            write_synced(staging / _TOKENIZER, tokenizer_proto)
        file_of = _plan(config, _ITEM_BYTES[dtype], max_shard_bytes)
        if len(set(file_of.values())) > 1:
            _write_json(staging / _SHARD_INDEX, _index_json(config, _ITEM_BYTES[dtype], file_of))
        _write_weights(staging, config, arrays, dtype, file_of)


def _plan(config: GemmaConfig, item_bytes: int, max_shard_bytes: int | None) -> dict[str, str]:
    """Path of each dataset -> its file, in the order in which Keras walks through a model."""
    datasets = [dataset for block in _blocks(config) for dataset in block]
    num_bytes = {dataset.path: item_bytes * _num_elements(dataset) for dataset in datasets}
    if max_shard_bytes is None or sum(num_bytes.values()) <= max_shard_bytes:
        return {dataset.path: _WEIGHTS for dataset in datasets}
    file_of: dict[str, str] = {}
    shard, shard_bytes = 0, 0
    for dataset in datasets:
        if shard_bytes and shard_bytes + num_bytes[dataset.path] > max_shard_bytes:
            shard, shard_bytes = shard + 1, 0
        file_of[dataset.path] = f"model_{shard:05d}.weights.h5"
        shard_bytes += num_bytes[dataset.path]
    return file_of


def _blocks(config: GemmaConfig) -> Iterator[list[KerasDataset]]:
    """Datasets by the layer of the model that they belong to; Keras walks a block by name."""
    for _, block in itertools.groupby(keras_datasets(config), key=_top_group):
        yield sorted(block, key=lambda dataset: dataset.path)


def _top_group(dataset: KerasDataset) -> str:
    return "/".join(dataset.path.split("/", 2)[:2])


def _num_elements(dataset: KerasDataset) -> int:
    return int(np.prod(dataset.shape, dtype=np.int64))


def _index_json(config: GemmaConfig, item_bytes: int, file_of: dict[str, str]) -> dict[str, object]:
    total = item_bytes * sum(map(_num_elements, keras_datasets(config)))
    places = {f"/{path.removesuffix('/0')}": name for path, name in file_of.items()}
    return {"metadata": {"total_size": float(total)}, "weight_map": places}


def _write_weights(
    directory: Path,
    config: GemmaConfig,
    arrays: Iterable[NamedArray],
    dtype: FloatName,
    file_of: dict[str, str],
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
                _write(file, dataset.path, _to_file(dataset, held.pop(dataset.name)), dtype)
                _name(file, dataset.path.removesuffix("/vars/0"))
        # Ends the check of the order: there must be no further array.
        assert next(source, None) is None
    finally:
        if file is not None:
            _close_synced(file)


def _write(file: h5py.File, path: str, array: NDArray[np.float32], dtype: FloatName) -> None:
    if dtype == "float32":
        file[path] = array
        return
    # HDF5 has no bfloat16: Keras stores the two bytes, and says so beside them.
    opaque = np.ascontiguousarray(array).astype(ml_dtypes.bfloat16).view(np.dtype("V2"))
    file.create_dataset(path, data=opaque).attrs["dtype"] = "bfloat16"


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
