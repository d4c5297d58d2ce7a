"""What stands in a ``.lora.h5`` file of keras-hub, before anybody asks which model it is for.

A and B of every adapted layer, under the layer's place in keras-hub's flattened list of layers, and
the rank. No names, no targets, no alpha: alpha is the rank::

    lora/vars/rank                        int64
    lora/<place>/vars/lora_kernel_a       float32
    lora/<place>/vars/lora_kernel_b       float32

HDF5 can point anywhere and declare what it does not store, so everything is looked at before it is
read. What this cannot exclude is a fault in the library itself: files of strangers are read in
`model.adapter_exchange.keras_child`.
"""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from model.adapter_shapes import MAX_RANK
from model.errors import PresetFileInvalid

# Gemma has at most 62 blocks with seven projections each.
_MAX_LAYERS = 1_000
_MAX_DIMENSIONS = 3
_A, _B = "lora_kernel_a", "lora_kernel_b"
_RANK = "lora/vars/rank"
_PLACE = re.compile(r"[1-9][0-9]{0,5}")
_FLOAT32 = np.dtype("<f4")

# What h5py raises when a file is truncated or its bytes make no sense, by experience.
_HDF5_ERRORS = (
    AttributeError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True, eq=False)
class LoraDatasets:
    """A file's content.

    Attributes:
        rank: Of every pair.
        pairs: Place in keras-hub's list of layers -> A and B.
    """

    rank: int
    pairs: Mapping[int, tuple[NDArray[np.float32], NDArray[np.float32]]]


def dataset_names(place: int) -> tuple[str, str]:
    """Where A and B of a layer stand in a file."""
    return f"lora/{place}/vars/{_A}", f"lora/{place}/vars/{_B}"


def read_datasets(file: io.BufferedIOBase, source: str) -> LoraDatasets:
    """The content of a file; ``source`` names it in errors.

    Raises:
        PresetFileInvalid: It is no such file.
    """
    file_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        # A file object, not a path: HDF5 then has no driver that could open another file.
        with h5py.File(file, "r") as opened:
            return _Reader(opened, source, file_bytes).read()
    except _HDF5_ERRORS as error:
        reason = " ".join(str(error).split())
        raise PresetFileInvalid(f"{source} is not a .lora.h5 file: {reason:.120}.") from error


def write_datasets(path: Path, datasets: LoraDatasets) -> None:
    """Makes a file, or replaces one, as keras-hub would write it."""
    with h5py.File(path, "w") as file:
        for place, pair in datasets.pairs.items():
            for name, array in zip(dataset_names(place), pair, strict=True):
                file[name] = np.ascontiguousarray(array, np.float32)
        file[_RANK] = np.int64(datasets.rank)


class _Reader:
    """One open file. Nothing is read before all of it was looked at."""

    def __init__(self, file: h5py.File, source: str, file_bytes: int) -> None:
        self._file = file
        self._source = source
        self._file_bytes = file_bytes

    def read(self) -> LoraDatasets:
        rank_dataset = self._dataset(_RANK, np.dtype("<i8"))
        if rank_dataset.shape != ():
            raise self._invalid(f"{_RANK} must be one number")
        rank = int(rank_dataset[()])
        if not 1 <= rank <= MAX_RANK:
            raise self._invalid(f"the rank must be in [1, {MAX_RANK}], got {rank}")
        found = {
            place: [self._dataset(name, _FLOAT32) for name in dataset_names(place)]
            for place in self._places()
        }
        datasets = [dataset for pair in found.values() for dataset in pair]
        if sum(4 * math.prod(dataset.shape) for dataset in datasets) > self._file_bytes:
            raise self._invalid("it declares more numbers than it holds")
        return LoraDatasets(rank, {place: (a[()], b[()]) for place, (a, b) in found.items()})

    def _places(self) -> list[int]:
        group = self._own_member("lora")
        if not isinstance(group, h5py.Group):
            raise self._invalid("lora must be a group")
        if len(group) > 1 + _MAX_LAYERS:
            raise self._invalid(f"it has more than {_MAX_LAYERS} layers")
        names = [name for name in group if name != "vars"]
        for name in names:
            if not _PLACE.fullmatch(name):
                raise self._invalid(f"layer {name!r:.20} of this model cannot have LoRA")
        if not names:
            raise PresetFileInvalid(f"{self._source} holds no adapted layer.")
        return sorted(map(int, names))

    def _dataset(self, name: str, dtype: np.dtype) -> h5py.Dataset:
        """A dataset of this type, stored plainly, in full, and in this file."""
        dataset = self._own_member(name)
        if not isinstance(dataset, h5py.Dataset):
            raise self._invalid(f"{name} must be a dataset")
        is_plain = dataset.chunks is None and not dataset.external and not dataset.is_virtual
        if not is_plain or dataset.dtype != dtype or dataset.shape is None:
            raise self._invalid(
                f"{name} must be {dtype} and stored plainly, it is {dataset.dtype!s:.40}"
            )
        is_small = len(dataset.shape) <= _MAX_DIMENSIONS
        if not is_small or dataset.id.get_storage_size() != dtype.itemsize * dataset.size:
            raise self._invalid(f"{name} is not stored in full")
        return dataset

    def _own_member(self, name: str) -> object:
        """A member reached by hard links only: others can lead to any file of this machine."""
        group: object = self._file
        for part in name.split("/"):
            if not isinstance(group, h5py.Group):
                raise self._invalid(f"{name} is missing")
            link = group.get(part, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise self._invalid(f"{name} is missing or not stored in this file")
            group = group[part]
        return group

    def _invalid(self, what: str) -> PresetFileInvalid:
        return PresetFileInvalid(f"{self._source}: {what}.")
