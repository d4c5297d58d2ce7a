"""Adapter files: the ``.lora.h5`` that keras-hub reads and writes.

The file holds A and B of every adapted projection in Keras' layout, under the place of its layer in
keras-hub's flattened list of layers, and the rank. No names, no targets, no alpha: alpha is the
rank::

    lora/vars/rank                        int64
    lora/<place>/vars/lora_kernel_a       float32
    lora/<place>/vars/lora_kernel_b       float32

In that list the embedding comes first, then each block with its layers in reverse order of their
creation (spec 7; Gemma 3's order was read off keras-hub 0.32 itself).
"""

import hashlib
import io
import os
import re
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from model.adapter_bank import Adapter, of_keras
from model.config import GemmaConfig
from model.errors import AdapterUnfit, PresetFileInvalid
from model.gemma.backbone import Backbone
from model.gemma.keras_lora import TARGETS, lora_shapes
from model.presets.regular_file import open_regular_file
from model.weight_names import block_weight_name

_SUFFIX = ".lora.h5"
_MAX_RANK = 1024
_A, _B = "lora_kernel_a", "lora_kernel_b"
_PLACE = re.compile(r"[1-9][0-9]{0,5}")

Place = tuple[int, str]


def save_lora(path: Path, backbone: Backbone) -> None:
    """Writes the LoRA of a backbone, complete or not at all.

    Raises:
        ValueError: The name does not end in ``.lora.h5``, or no layer has LoRA.
    """
    _check_suffix(path)
    if not backbone.lora_layers:
        raise ValueError("No layer has LoRA; call enable_lora first.")
    places = {
        block_weight_name(layer, target): number
        for number, (layer, target) in lora_places(backbone.config).items()
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with h5py.File(temporary, "w") as file:
        for name, holder in backbone.lora_layers.items():
            group = f"lora/{places[name]}/vars"
            file[f"{group}/{_A}"] = np.asarray(holder.lora_kernel_a, np.float32)
            file[f"{group}/{_B}"] = np.asarray(holder.lora_kernel_b, np.float32)
            rank = holder.lora_kernel_b.shape[0]
        file["lora/vars/rank"] = np.int64(rank)
    temporary.replace(path)


def load_lora(path: Path, backbone: Backbone) -> None:
    """Reads a file into a backbone, whose LoRA is enabled with the file's targets if it is not.

    Raises:
        ValueError: The name does not end in ``.lora.h5``, or LoRA is enabled with another rank or
            other targets than the file's.
        PresetFileMissing: There is no such file.
        PresetFileInvalid: It is not such a file, or does not fit this model.
    """
    _check_suffix(path)
    rank, arrays = _read(path, backbone.config)
    targets = tuple(target for target in TARGETS if (0, target) in arrays)
    expected = {(layer, t) for layer in range(backbone.config.num_layers) for t in targets}
    if arrays.keys() != expected:
        raise PresetFileInvalid(f"{path}: some blocks have other targets than the first one.")
    if not backbone.lora_layers:
        backbone.enable_lora(rank, target_layer_names=targets)
    holders = {place: block_weight_name(*place) for place in arrays}
    if set(holders.values()) != backbone.lora_layers.keys():
        raise ValueError(f"LoRA is enabled with other targets than {', '.join(targets)}.")
    for place, (a, b) in arrays.items():
        holder = backbone.lora_layers[holders[place]]
        if holder.lora_kernel_b.shape[0] != rank:
            enabled = holder.lora_kernel_b.shape[0]
            raise ValueError(f"LoRA is enabled with rank {enabled}, the file has rank {rank}.")
        holder.lora_kernel_a.assign(a)
        holder.lora_kernel_b.assign(b)


def read_adapter(path: Path, digest: str, config: GemmaConfig) -> Adapter:
    """Reads a file whole and takes it apart only if it is the version that was named.

    Args:
        path: Of the file.
        digest: ``sha256:`` and that of its bytes.
        config: Of the model.

    Raises:
        AdapterUnfit: It is another kind of file, or another version.
        PresetFileMissing: There is no such file.
        PresetFileInvalid: It is not such a file, or does not fit this model.
    """
    if not path.name.endswith(_SUFFIX):
        raise AdapterUnfit(f"{path}: the name of an adapter file ends in {_SUFFIX}.")
    with open_regular_file(path.parent, path.name) as source:
        content = source.read()
    if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
        raise AdapterUnfit(f"{path} has changed since it was named; start the service again.")
    rank, arrays = _opened(path, io.BytesIO(content), config)
    return of_keras(rank, arrays)


def lora_places(config: GemmaConfig) -> dict[int, Place]:
    """Place in keras-hub's list of layers -> (block, target), for everything that can have LoRA."""
    layers = _layers_of_a_block(config)
    return {
        1 + block * len(layers) + offset: (block, name)
        for block in range(config.num_layers)
        for offset, name in enumerate(layers)
        if name in TARGETS
    }


def _layers_of_a_block(config: GemmaConfig) -> list[str]:
    return [
        "block",
        "ffw_linear",
        "ffw_gating_2",
        "ffw_gating",
        *(["post_ffw_norm"] if config.use_post_ffw_norm else []),
        "pre_ffw_norm",
        "attention",
        "attention_output",
        *(["key_norm", "query_norm"] if config.use_query_key_norm else []),
        "value",
        "key",
        "query",
        *(["post_attention_norm"] if config.use_post_attention_norm else []),
        "pre_attention_norm",
    ]


def _check_suffix(path: Path) -> None:
    if not path.name.endswith(_SUFFIX):
        raise ValueError(f"The file name must end in {_SUFFIX}, got {path.name!r:.80}.")


Arrays = dict[Place, tuple[NDArray[np.float32], NDArray[np.float32]]]


def _read(path: Path, config: GemmaConfig) -> tuple[int, Arrays]:
    """Rank and arrays, every one of them checked before it is read."""
    with open_regular_file(path.parent, path.name) as source:
        return _opened(path, source, config)


def _opened(path: Path, source: io.BufferedIOBase, config: GemmaConfig) -> tuple[int, Arrays]:
    try:
        # A file object, not a path: HDF5 then has no driver that could open another file.
        with h5py.File(source, "r") as file:
            return _read_file(path, file, config)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise PresetFileInvalid(f"{path} is not a {_SUFFIX} file: {error!s:.120}.") from error


def _read_file(path: Path, file: h5py.File, config: GemmaConfig) -> tuple[int, Arrays]:
    rank = int(_dataset(path, file, "lora/vars/rank", (), np.dtype("int64"))[()])
    if not 1 <= rank <= _MAX_RANK:
        raise PresetFileInvalid(f"{path}: the rank must be in [1, {_MAX_RANK}], got {rank}.")
    places = lora_places(config)
    arrays: Arrays = {}
    for name in _group(path, file, "lora"):
        if name == "vars":
            continue
        if not _PLACE.fullmatch(name) or int(name) not in places:
            raise PresetFileInvalid(f"{path}: layer {name!r:.20} of this model cannot have LoRA.")
        place = places[int(name)]
        shapes = lora_shapes(config, place[1], rank)
        prefix = f"lora/{name}/vars"
        float32 = np.dtype("float32")
        arrays[place] = (
            _dataset(path, file, f"{prefix}/{_A}", shapes.a, float32)[()],
            _dataset(path, file, f"{prefix}/{_B}", shapes.b, float32)[()],
        )
    if not arrays:
        raise PresetFileInvalid(f"{path} holds no adapted layer.")
    return rank, arrays


def _group(path: Path, file: h5py.File, name: str) -> h5py.Group:
    group = _own_member(path, file, name)
    if not isinstance(group, h5py.Group):
        raise PresetFileInvalid(f"{path}: {name} must be a group.")
    return group


def _dataset(
    path: Path, file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> h5py.Dataset:
    """A dataset of exactly this shape and type, stored plainly and in this file."""
    dataset = _own_member(path, file, name)
    if not isinstance(dataset, h5py.Dataset):
        raise PresetFileInvalid(f"{path}: {name} must be a dataset.")
    is_plain = dataset.chunks is None and not dataset.external and not dataset.is_virtual
    if not is_plain or dataset.shape != shape or dataset.dtype != dtype:
        raise PresetFileInvalid(
            f"{path}: {name} must be {dtype} of shape {list(shape)}, stored plainly; it is "
            f"{dataset.dtype!s:.40} of shape {list(dataset.shape or ())!s:.80}."
        )
    return dataset


def _own_member(path: Path, file: h5py.File, name: str) -> object:
    """A member reached by hard links only: others can lead to any file of this machine."""
    group: object = file
    for part in name.split("/"):
        if not isinstance(group, h5py.Group):
            raise PresetFileInvalid(f"{path}: {name} is missing.")
        link = group.get(part, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise PresetFileInvalid(f"{path}: {name} is missing or not stored in this file.")
        group = group[part]
    return group
