"""The header of a GGUF file, read within fixed budgets. Nothing here trusts a number in the file.

A file is: magic, version, two counts, the metadata (key, type, value)*, the tensor infos (name,
dimensions, type, offset)*, padding, then the tensor bytes, which this module never touches.

Every length is compared with its budget and with the bytes that are left before anything of that
size is made, and every value is charged to one memory budget. A hostile header therefore costs at
most `MAX_HEADER_BYTES` read and `MAX_PARSED_BYTES` built, and the loops over it are bounded by the
same two numbers. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import struct
import sys
from dataclasses import dataclass, replace
from enum import IntEnum
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from model.errors import PresetFileInvalid
from model.presets.regular_file import open_regular_file

MAX_METADATA_KEYS = 4_096
MAX_TENSORS = 20_000
MAX_STRING_BYTES = 1 << 20
MAX_NAME_BYTES = 1_024
MAX_ARRAY_ELEMENTS = 1 << 20
MAX_RANK = 4
MAX_ALIGNMENT_BYTES = 1 << 16
# Gemma 3's header, the largest of the family, is 6.5 MB and takes 22 MiB as Python objects.
MAX_HEADER_BYTES = 32 << 20
MAX_PARSED_BYTES = 32 << 20

# What one entry costs in Python objects besides its variable part; measured, rounded up.
_ENTRY_BYTES = 512

_MAGIC = b"GGUF"
_SUPPORTED_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_DAMAGED = "The file is damaged or hostile; download it again."

_BOOL, _STRING, _ARRAY = 7, 8, 9
# GGUF's type number -> dtype. These are all but strings and arrays.
_NUMBER_DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

MetadataValue = bool | int | float | str | tuple[str, ...] | NDArray[Any]


class TensorType(IntEnum):
    """The tensor encodings that are read: number in the file, then the size of a block."""

    block_values: int
    block_bytes: int

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    BF16 = 30, 1, 2

    def __new__(cls, number: int, block_values: int, block_bytes: int) -> "TensorType":
        member = int.__new__(cls, number)
        member._value_ = number
        member.block_values, member.block_bytes = block_values, block_bytes
        return member


# What TensorType(number) would do, if mypy did not take it for a call of __new__.
_TENSOR_TYPES = {int(tensor_type): tensor_type for tensor_type in TensorType}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies and how it is encoded.

    Attributes:
        shape: Slowest axis first, ``[out, in]`` for a kernel: GGUF's dimensions reversed.
        offset_bytes: From the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    tensor_type: TensorType
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All that a GGUF file says about itself, checked against the size of the file.

    Attributes:
        metadata: Numbers and strings as Python objects, arrays of numbers as numpy arrays, arrays
            of strings as tuples.
        tensors: By name, in the order of the file.
        data_offset: Byte at which the tensor data starts.
        file_bytes: Size of the file when it was read.
    """

    path: Path
    version: int
    metadata: dict[str, MetadataValue]
    tensors: dict[str, GgufTensor]
    data_offset: int
    file_bytes: int


def read_header(path: Path) -> GgufHeader:
    """The header of the GGUF file at ``path``.

    Raises:
        PresetFileMissing: There is no file at ``path``.
        PresetFileInvalid: It is no regular file, cannot be read, or anything in it is wrong.
    """
    with open_gguf(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        data = file.read(MAX_HEADER_BYTES)
    return _Parser(path, data, file_bytes).header()


def open_gguf(path: Path) -> BufferedReader:
    """The file at ``path``, open for reading. Links are followed: Hugging Face's cache has them."""
    try:
        target = Path(os.path.realpath(path))
        if not target.name:
            raise ValueError("is the root directory")
        return open_regular_file(target.parent, target.name)
    except ValueError as error:
        raise PresetFileInvalid(f"{str(path)!r:.200} {error}. Give the path of a file.") from error


class _Parser:
    """Reads one header from left to right. ``where`` in its methods names what is being read."""

    def __init__(self, path: Path, data: bytes, file_bytes: int) -> None:
        self.path = path
        self.data = data
        self.file_bytes = file_bytes
        self.position = 0
        self.memory_left = MAX_PARSED_BYTES

    def header(self) -> GgufHeader:
        version = self._version()
        num_tensors = self._count("the tensor count", MAX_TENSORS)
        num_keys = self._count("the metadata count", MAX_METADATA_KEYS)
        metadata = self._metadata(num_keys)
        alignment = self._alignment(metadata)
        infos = [self._tensor_info(i) for i in range(num_tensors)]
        data_offset = -(-self.position // alignment) * alignment
        tensors = self._placed(infos, alignment, data_offset)
        return GgufHeader(self.path, version, metadata, tensors, data_offset, self.file_bytes)

    def fail(self, problem: str, remedy: str = _DAMAGED) -> NoReturn:
        raise PresetFileInvalid(f"{self.path}: {problem}. {remedy}")

    def _take(self, num_bytes: int, where: str) -> int:
        """Steps over ``num_bytes`` and returns where they start."""
        start, end = self.position, self.position + num_bytes
        if end > len(self.data):
            if end > self.file_bytes:
                self.fail(
                    f"{where} would end at byte {end} but the file ends at byte {self.file_bytes}",
                    "The download was cut short or damaged; download it again.",
                )
            self.fail(f"the header is larger than {MAX_HEADER_BYTES} bytes, at {where}")
        self.position = end
        return start

    def _charge(self, num_bytes: int, where: str) -> None:
        self.memory_left -= num_bytes
        if self.memory_left < 0:
            self.fail(
                f"the header needs more than {MAX_PARSED_BYTES} bytes of memory, at {where} "
                f"(byte {self.position})"
            )

    def _u32(self, where: str) -> int:
        return int(_U32.unpack_from(self.data, self._take(4, where))[0])

    def _u64(self, where: str) -> int:
        return int(_U64.unpack_from(self.data, self._take(8, where))[0])

    def _count(self, where: str, limit: int) -> int:
        count = self._u64(where)
        if count > limit:
            self.fail(f"{where} at byte {self.position - 8} is {count}, above the limit of {limit}")
        return count

    def _text(self, where: str, limit: int) -> str:
        length = self._u64(f"the length of {where}")
        if length > limit:
            self.fail(
                f"{where} at byte {self.position - 8} is {length} bytes long, above the limit of "
                f"{limit}"
            )
        start = self._take(length, where)
        try:
            text = self.data[start : self.position].decode()
        except UnicodeDecodeError:
            self.fail(f"{where} at byte {start} is not UTF-8")
        self._charge(sys.getsizeof(text), where)
        return text

    def _version(self) -> int:
        start = self._take(4, "the magic number")
        if self.data[start : self.position] != _MAGIC:
            self.fail("does not start with the letters GGUF", "Give the path of a GGUF file.")
        version = self._u32("the version")
        if version & 0xFFFF == 0:
            self.fail(
                "is big endian, or its version is damaged", "Convert the model to little endian."
            )
        if version not in _SUPPORTED_VERSIONS:
            self.fail(
                f"is GGUF version {version}, but only versions 2 and 3 are read",
                "Convert the model with a current llama.cpp.",
            )
        return version

    def _metadata(self, num_keys: int) -> dict[str, MetadataValue]:
        metadata: dict[str, MetadataValue] = {}
        for i in range(num_keys):
            self._charge(_ENTRY_BYTES, "the metadata")
            start = self.position
            key = self._text(f"metadata key {i}", MAX_NAME_BYTES)
            where = f"key {key!r:.80}"
            if not key or key in metadata:
                self.fail(f"{where} at byte {start} is empty or occurs twice")
            metadata[key] = self._value(where)
        return metadata

    def _value(self, where: str) -> MetadataValue:
        kind = self._u32(f"the type of {where}")
        if kind == _STRING:
            return self._text(where, MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self._array(where)
        number: bool | int | float = self._numbers(kind, 1, where).item()
        return number

    def _array(self, where: str) -> tuple[str, ...] | NDArray[Any]:
        kind = self._u32(f"the element type of {where}")
        if kind == _ARRAY:
            self.fail(f"{where} at byte {self.position - 4} is an array of arrays")
        count = self._count(f"the length of {where}", MAX_ARRAY_ELEMENTS)
        if kind == _STRING:
            return self._strings(count, where)
        return self._numbers(kind, count, where)

    def _numbers(self, kind: int, count: int, where: str) -> NDArray[Any]:
        dtype = _NUMBER_DTYPES.get(kind)
        if dtype is None:
            self.fail(f"{where} before byte {self.position} has the unknown type {kind}")
        self._charge(count * dtype.itemsize, where)
        start = self._take(count * dtype.itemsize, where)
        # A copy, so that the file's bytes are not kept alive.
        numbers: NDArray[Any] = np.frombuffer(self.data, dtype, count, start).copy()
        if kind == _BOOL:
            if count and numbers.max() > 1:
                self.fail(f"{where} at byte {start} is a truth value other than 0 and 1")
            return numbers.astype(np.bool_)
        return numbers

    def _strings(self, count: int, where: str) -> tuple[str, ...]:
        """The loop over the vocabulary: 262,144 rounds, hence the local names."""
        data, end, memory_left = self.data, len(self.data), self.memory_left
        unpack, getsizeof = _U64.unpack_from, sys.getsizeof
        position = self.position
        texts: list[str] = []
        for i in range(count):
            start = position + 8
            length = unpack(data, position)[0] if start <= end else 0
            position = start + length
            if position > end or length > MAX_STRING_BYTES:
                # Once more with the checks in order, for the message.
                self.position = start - 8
                self._text(f"element {i} of {where}", MAX_STRING_BYTES)
            try:
                text = data[start:position].decode()
            except UnicodeDecodeError:
                self.fail(f"element {i} of {where} at byte {start} is not UTF-8")
            memory_left -= getsizeof(text) + 8
            if memory_left < 0:
                break
            texts.append(text)
        self.position = position
        self._charge(self.memory_left - memory_left, where)
        return tuple(texts)

    def _alignment(self, metadata: dict[str, MetadataValue]) -> int:
        value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or value % 8 or not 8 <= value <= MAX_ALIGNMENT_BYTES:
            self.fail(
                f"key 'general.alignment' must be a multiple of 8 in [8, {MAX_ALIGNMENT_BYTES}], "
                f"not {value if isinstance(value, int) else type(value).__name__}"
            )
        return value

    def _tensor_info(self, index: int) -> GgufTensor:
        """One tensor info, its offset still relative to the data section."""
        self._charge(_ENTRY_BYTES, "the tensor list")
        name = self._text(f"the name of tensor {index}", MAX_NAME_BYTES)
        where = f"tensor {name!r:.80}"
        rank = self._u32(f"the rank of {where}")
        if not 1 <= rank <= MAX_RANK:
            self.fail(f"{where} has rank {rank}; it must be in [1, {MAX_RANK}]")
        shape = tuple(reversed([self._u64(f"the dimensions of {where}") for _ in range(rank)]))
        type_number = self._u32(f"the type of {where}")
        offset = self._u64(f"the offset of {where}")
        try:
            tensor_type = _TENSOR_TYPES[type_number]
        except KeyError:
            names = ", ".join(sorted(kind.name for kind in TensorType))
            self.fail(
                f"{where} has the tensor type {type_number}, which is not read",
                f"Use a file with these types only: {names}.",
            )
        num_values = math.prod(shape)  # Python integers do not wrap around
        if num_values == 0 or shape[-1] % tensor_type.block_values:
            self.fail(
                f"{where} has shape {list(shape)}; {tensor_type.name} needs non-empty rows of a "
                f"multiple of {tensor_type.block_values} values"
            )
        size_bytes = num_values // tensor_type.block_values * tensor_type.block_bytes
        return GgufTensor(name, shape, tensor_type, offset, size_bytes)

    def _placed(
        self, infos: list[GgufTensor], alignment: int, data_offset: int
    ) -> dict[str, GgufTensor]:
        """The tensors with offsets in the file, once they are known to be apart and inside it."""
        tensors: dict[str, GgufTensor] = {}
        for info in infos:
            where = f"tensor {info.name!r:.80}"
            if not info.name or info.name in tensors:
                self.fail(f"{where} has no name or occurs twice")
            if info.offset_bytes % alignment:
                self.fail(f"{where} has offset {info.offset_bytes}, no multiple of {alignment}")
            start = data_offset + info.offset_bytes
            if start + info.size_bytes > self.file_bytes:
                self.fail(
                    f"{where} spans bytes {start} to {start + info.size_bytes} but the file ends "
                    f"at byte {self.file_bytes}",
                    "The download was cut short or damaged; download it again.",
                )
            tensors[info.name] = replace(info, offset_bytes=start)
        end, last = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset_bytes):
            if tensor.offset_bytes < end:
                self.fail(f"tensor {tensor.name!r:.80} overlaps tensor {last!r:.80}")
            end, last = tensor.offset_bytes + tensor.size_bytes, tensor.name
        return tensors
