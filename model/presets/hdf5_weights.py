"""Reads the weights of a Keras preset from HDF5, after proving that the file is only that.

HDF5 can point anywhere: links, external storage and virtual datasets read other files of this
machine, filters load plug-ins, and a dataset may declare a terabyte and store nothing. So every
file is walked first, without following or reading anything, and must hold exactly the datasets
that the config implies, plain and stored in full. Only then are they read. Integers are divided by
their scales, as Keras defines it.

What this cannot exclude is a fault in the HDF5 library itself; the caller limits time and memory.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence, Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from model.config import GemmaConfig
from model.errors import PresetFileInvalid
from model.presets.keras_layout import KerasDataset, keras_datasets, to_run_time
from model.presets.regular_file import open_regular_file

# A block written by keras-hub has about 45 groups and datasets, five levels deep.
_MAX_OBJECTS_PER_BLOCK = 128
_MAX_DEPTH = 8
_MEMBER_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")

_BFLOAT16_STORAGE = np.dtype("V2")
_INT8 = np.dtype("i1")
_FLOATS = (np.dtype("<f4"), np.dtype("<f2"), _BFLOAT16_STORAGE)
# 128 divided by it is still a number. Keras' scales are 127 / (the largest weight + 1e-7).
_SMALLEST_SCALE = 1e-36
_TYPE_CLASSES = (h5py.h5t.FLOAT, h5py.h5t.INTEGER, h5py.h5t.OPAQUE)

# What h5py raises when a file is truncated or its bytes make no sense, by experience.
_HDF5_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    OverflowError,
    AttributeError,
    NotImplementedError,
)


@dataclass(frozen=True, slots=True)
class _Found:
    """A dataset that passed every check that needs no config."""

    file: Path
    dataset: h5py.Dataset


def read_hdf5_arrays(
    directory: Path,
    file_names: Sequence[str],
    config: GemmaConfig,
    int8_weights: AbstractSet[str] = frozenset(),
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Name and run-time array of every weight, in the order of `weight_specs`.

    Args:
        directory: The preset.
        file_names: One weights file, or all shards. Each weight must be in exactly one of them.
        config: Decides which datasets must be there.
        int8_weights: Names of the weights that are integers with scales; the others are floats.

    Raises:
        PresetFileMissing: A file is not there.
        PresetFileInvalid: The message names the file and, where there is one, the dataset.
    """
    with ExitStack() as stack:
        found: dict[str, _Found] = {}
        for file_name in file_names:
            path = directory / file_name
            source = stack.enter_context(open_regular_file(directory, file_name))
            with _naming(path):
                # A file object, not a path: HDF5 then has no driver that could open another file.
                file = stack.enter_context(h5py.File(source, "r"))
            for name, dataset in _preflight(path, source, file, config).items():
                if name in found:
                    raise PresetFileInvalid(
                        f"{path}: dataset {name} is also in {found[name].file.name}."
                    )
                found[name] = _Found(path, dataset)
        datasets = list(keras_datasets(config, int8_weights))
        _check_fits_config(directory / file_names[0], found, datasets)
        for expected in datasets:
            yield expected.name, to_run_time(expected, _read_weight(expected, found))


def _preflight(
    path: Path, source: BufferedReader, file: h5py.File, config: GemmaConfig
) -> dict[str, h5py.Dataset]:
    """Every dataset of one file by its path. Reads no data and follows no link."""
    source_bytes = os.fstat(source.fileno()).st_size
    budget = _MAX_OBJECTS_PER_BLOCK * (config.num_layers + 1)
    datasets: dict[str, h5py.Dataset] = {}
    groups: list[tuple[str, h5py.Group, int]] = [("", file, 0)]
    while groups:
        prefix, group, depth = groups.pop()
        with _naming(path, prefix or "/"):
            num_members = len(group)
        budget -= num_members
        # Also ends the walk of a group that contains itself.
        if budget < 0 or depth > _MAX_DEPTH:
            raise PresetFileInvalid(
                f"{path}: {prefix or '/'} has more groups than this config explains."
            )
        for name in _member_names(path, prefix, group):
            member_path = f"{prefix}/{name}" if prefix else name
            member = _open_member(path, member_path, group, name)
            if isinstance(member, h5py.Group):
                groups.append((member_path, member, depth + 1))
            else:
                _check_is_plain(path, member_path, member, source_bytes)
                datasets[member_path] = member
    declared_bytes = sum(map(_num_bytes, datasets.values()))
    if declared_bytes > source_bytes:
        raise PresetFileInvalid(
            f"{path} declares {declared_bytes:,} bytes of weights and has only {source_bytes:,}."
        )
    return datasets


def _num_bytes(dataset: h5py.Dataset) -> int:
    # Not Dataset.nbytes, which wraps around at 2**63.
    shape: tuple[int, ...] = dataset.shape
    return math.prod(shape) * int(dataset.dtype.itemsize)


def _member_names(path: Path, prefix: str, group: h5py.Group) -> list[str]:
    with _naming(path, prefix or "/"):
        names = list(group)
    for name in names:
        # h5py gives a name that is not UTF-8 as bytes.
        if not isinstance(name, str) or not _MEMBER_NAME.fullmatch(name):
            raise PresetFileInvalid(f"{path}: {prefix or '/'} has a member named {name!r:.60}.")
    return names


def _open_member(
    path: Path, member_path: str, group: h5py.Group, name: str
) -> h5py.Group | h5py.Dataset:
    with _naming(path, member_path):
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise PresetFileInvalid(
                f"{path}: {member_path} is of kind {type(link).__name__}; weights must be in the "
                "file itself."
            )
        member = group[name]
    if not isinstance(member, (h5py.Group, h5py.Dataset)):
        raise PresetFileInvalid(f"{path}: {member_path} is neither a group nor a dataset.")
    return member


def _check_is_plain(path: Path, name: str, dataset: h5py.Dataset, source_bytes: int) -> None:
    with _naming(path, name):
        reason = _what_is_odd(dataset, source_bytes)
    if reason is not None:
        raise PresetFileInvalid(f"{path}: dataset {name} {reason}.")


def _what_is_odd(dataset: h5py.Dataset, source_bytes: int) -> str | None:
    created = dataset.id.get_create_plist()
    layout = created.get_layout()
    if layout == h5py.h5d.VIRTUAL:
        return "is virtual: its data are in other files"
    if created.get_external_count():
        return "has external storage: its data are in other files"
    if created.get_nfilters():
        return "is compressed or filtered; save the weights without"
    if layout != h5py.h5d.CONTIGUOUS:
        return "is not stored in one piece"
    # HDF5's own type class first: h5py's dtype of an odd type can be costly or fail.
    type_class = dataset.id.get_type().get_class()
    if type_class not in _TYPE_CLASSES or dataset.dtype not in (*_FLOATS, _INT8):
        return f"has type {dataset.dtype!s:.40}; only float32, float16, bfloat16 and int8 are read"
    if dataset.shape is None:
        return "is empty"
    attributes = _attribute_names(dataset)
    if dataset.dtype == _BFLOAT16_STORAGE:
        if attributes != ["dtype"] or _short_text_attribute(dataset, "dtype") != "bfloat16":
            return "holds opaque data without the attribute dtype = bfloat16"
    elif attributes:
        return f"has attributes that no weight needs: {attributes[0]!r:.40}"
    offset, num_bytes = dataset.id.get_offset(), _num_bytes(dataset)
    if offset is None or dataset.id.get_storage_size() != num_bytes:
        return "declares data that are not stored"
    if offset + num_bytes > source_bytes:
        return f"ends {offset + num_bytes - source_bytes:,} bytes after the end of the file"
    return None


def _attribute_names(dataset: h5py.Dataset) -> list[str]:
    num_attributes = h5py.h5a.get_num_attrs(dataset.id)
    return list(dataset.attrs) if num_attributes <= 8 else ["(more than eight)"]


def _short_text_attribute(dataset: h5py.Dataset, name: str) -> str | None:
    attribute = dataset.attrs.get_id(name)
    if attribute.get_type().get_class() != h5py.h5t.STRING or attribute.shape != ():
        return None
    # A text of variable length is stored as a 16-byte reference.
    if attribute.get_storage_size() > 16:
        return None
    text = dataset.attrs[name]
    return text.decode() if isinstance(text, bytes) else str(text)


def _check_fits_config(
    first_file: Path, found: dict[str, _Found], datasets: Sequence[KerasDataset]
) -> None:
    """Names, shapes and kinds of numbers are those that config.json implies, and no others."""
    shapes = {dataset.path: dataset.shape for dataset in datasets}
    shapes |= {dataset.scale_path: dataset.scale_shape for dataset in datasets if dataset.is_int8}
    int8_paths = {dataset.path for dataset in datasets if dataset.is_int8}
    for name in sorted(found.keys() - shapes.keys()):
        raise PresetFileInvalid(
            f"{found[name].file}: dataset {name} does not belong to the model in config.json."
        )
    for path, shape in shapes.items():
        if path not in found:
            raise PresetFileInvalid(f"{first_file}: dataset {path} is missing.")
        dataset = found[path].dataset
        if dataset.shape != shape:
            raise PresetFileInvalid(
                f"{found[path].file}: dataset {path} has shape {dataset.shape}, config.json "
                f"implies {shape}."
            )
        if (dataset.dtype == _INT8) != (path in int8_paths):
            kinds = ("int8", "floats") if dataset.dtype == _INT8 else ("floats", "int8")
            raise PresetFileInvalid(
                f"{found[path].file}: dataset {path} has {kinds[0]}, the dtype in config.json "
                f"implies {kinds[1]}."
            )


def _read_weight(expected: KerasDataset, found: dict[str, _Found]) -> NDArray[np.float32]:
    stored = _read(expected.path, found[expected.path])
    if not expected.is_int8:
        return np.ascontiguousarray(stored, dtype=np.float32)
    place = found[expected.scale_path]
    scales = _read(expected.scale_path, place).astype(np.float32)
    # So large that they are no numbers any more, or so small that their quotients are none.
    if not (np.isfinite(scales).all() and (scales > _SMALLEST_SCALE).all()):
        raise PresetFileInvalid(
            f"{place.file}: dataset {expected.scale_path} has a scale that is not a positive "
            "number of sensible size."
        )
    weight: NDArray[np.float32] = np.divide(
        stored, scales.reshape(expected.divisor_shape), dtype=np.float32
    )
    return weight


def _read(path: str, found: _Found) -> NDArray[Any]:
    """The numbers of a dataset in their own type."""
    with _naming(found.file, path):
        stored = np.empty(found.dataset.shape, dtype=found.dataset.dtype)
        found.dataset.read_direct(stored)
    return stored.view(ml_dtypes.bfloat16) if stored.dtype == _BFLOAT16_STORAGE else stored


@contextmanager
def _naming(path: Path, member: str | None = None) -> Iterator[None]:
    """Turns whatever h5py raises into one line that names the file and the place in it."""
    try:
        yield
    except _HDF5_ERRORS as error:
        place = f"{path}: {member}" if member else f"{path}"
        reason = " ".join(str(error).split())
        raise PresetFileInvalid(
            f"{place} cannot be read; the file is truncated or damaged ({reason:.160})."
        ) from error
