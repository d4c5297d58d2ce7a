"""Checks the header of a safetensors file before anything else reads it.

The library is safe against memory faults but not against cost: a million empty tensors in a
header keep it busy for seconds and take a gigabyte. So the header is bounded, counted and parsed
here first, and must describe exactly the arrays that the caller knows.

A file is an 8-byte little-endian length, a JSON header of that length, and the data.
"""

import io
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.errors import PresetFileInvalid
from model.presets.regular_file import open_regular_file
from model.presets.strict_json import parse_object
from model.weight_names import WeightSpec

_MAX_HEADER_BYTES = 4 << 20
_MAX_TENSORS = 20_000
_MAX_RANK = 8
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}

# Most often these occur in a header of _MAX_TENSORS tensors. Counting them bounds what the parser
# can allocate: four megabytes of "[],[],[]" would otherwise become a million lists.
_MAX_COUNTS = {
    b":": 4 * _MAX_TENSORS + 64,
    b"[": 2 * _MAX_TENSORS,
    b"{": _MAX_TENSORS + 2,
    b",": (4 + _MAX_RANK) * _MAX_TENSORS,
}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one array stands in its file: ``num_bytes`` from byte ``start`` of the file on."""

    dtype: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A header that is bounded and well-formed JSON. Its entries are not checked yet.

    Attributes:
        source: The file, as messages name it.
        entries: Name of a tensor -> its description, as it stands in the header.
        metadata: What else the header says, text by text.
        data_start: Where the tensors begin.
        file_bytes: Where they must end.
    """

    source: str
    entries: dict[str, object]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int

    def shape(self, name: str) -> tuple[int, ...]:
        """What an entry says that its shape is, for callers that do not know better.

        Raises:
            PresetFileInvalid: It is not there, or says nothing of the kind.
        """
        entry = self.entries.get(name)
        shape = _naturals(entry.get("shape")) if isinstance(entry, dict) else None
        if shape is None:
            raise PresetFileInvalid(f"{self.source}: tensor {name!r:.80} has no shape.")
        return shape


def check_safetensors(path: Path, specs: Iterable[WeightSpec]) -> dict[str, TensorPlace]:
    """Where each array is, having checked that ``path`` holds exactly ``specs`` and nothing else.

    Raises:
        PresetFileMissing: There is no such file.
        PresetFileInvalid: The message names the file and, where there is one, the tensor.
    """
    return check_tensors(read_header(path), {spec.name: spec.shape for spec in specs})


def read_header(path: Path) -> SafetensorsHeader:
    """The header of ``path``, for callers that learn from it which tensors to expect.

    Raises:
        PresetFileMissing, PresetFileInvalid: As in `check_safetensors`.
    """
    with open_regular_file(path.parent, path.name) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        return _read_header(file, file_bytes, str(path))


def header_of(content: bytes, source: str) -> SafetensorsHeader:
    """The header of a file that is in memory; ``source`` names it in errors.

    Raises:
        PresetFileInvalid: As in `check_safetensors`.
    """
    return _read_header(io.BytesIO(content), len(content), source)


def _read_header(file: io.BufferedIOBase, file_bytes: int, source: str) -> SafetensorsHeader:
    length = int.from_bytes(file.read(8), "little")
    if file_bytes < 8 or not 2 <= length <= min(file_bytes - 8, _MAX_HEADER_BYTES):
        raise PresetFileInvalid(
            f"{source} is not safetensors: its header has {length:,} bytes, the file "
            f"{file_bytes:,}, and a header at most {_MAX_HEADER_BYTES:,}."
        )
    raw_header = file.read(length)
    for symbol, most in _MAX_COUNTS.items():
        if raw_header.count(symbol) > most:
            raise PresetFileInvalid(
                f"{source}: the header describes more than {_MAX_TENSORS} tensors."
            )
    entries = parse_object(raw_header, f"{source}: the header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise PresetFileInvalid(f"{source}: the metadata of its header must be texts by name.")
    return SafetensorsHeader(source, entries, metadata, 8 + length, file_bytes)


def check_tensors(
    header: SafetensorsHeader, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorPlace]:
    """Where each tensor of ``shapes`` is, having checked that the file holds exactly those.

    Raises:
        PresetFileInvalid: The message names the file and, where there is one, the tensor.
    """
    source, entries = header.source, header.entries
    for name in sorted(shapes.keys() - entries.keys()):
        raise PresetFileInvalid(f"{source}: tensor {name} is missing.")
    for name in sorted(entries.keys() - shapes.keys()):
        raise PresetFileInvalid(f"{source}: tensor {name!r:.80} does not belong to the model.")
    places = {
        name: _place(source, name, entries[name], shape, header.data_start)
        for name, shape in shapes.items()
    }
    end = header.data_start
    for place in sorted(places.values(), key=lambda place: place.start):
        if place.start != end:
            raise PresetFileInvalid(
                f"{source}: its tensors overlap or leave a gap at byte {end:,}."
            )
        end += place.num_bytes
    if end != header.file_bytes:
        raise PresetFileInvalid(
            f"{source} has {header.file_bytes:,} bytes, its header describes {end:,}; the file is "
            "truncated or has been extended."
        )
    return places


def _place(
    source: str, name: str, entry: object, shape: tuple[int, ...], data_start: int
) -> TensorPlace:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise PresetFileInvalid(
            f"{source}: tensor {name} is not described by dtype, shape, offsets."
        )
    dtype, found_shape = entry["dtype"], _naturals(entry["shape"])
    offsets = _naturals(entry["data_offsets"])
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise PresetFileInvalid(
            f"{source}: tensor {name} has dtype {dtype!r:.40}; only {', '.join(_ITEM_BYTES)} "
            "are read."
        )
    if found_shape is None or len(found_shape) > _MAX_RANK or found_shape != shape:
        raise PresetFileInvalid(
            f"{source}: tensor {name} has shape {entry['shape']!r:.80}, the config implies "
            f"{list(shape)}."
        )
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets is None or len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise PresetFileInvalid(
            f"{source}: tensor {name} needs {num_bytes:,} bytes, its offsets are "
            f"{entry['data_offsets']!r:.80}."
        )
    return TensorPlace(dtype, data_start + offsets[0], num_bytes)


def _naturals(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    if not all(type(item) is int and item >= 0 for item in value):
        return None
    return tuple(value)
