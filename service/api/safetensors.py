"""Tensors of an answer: in base64 within its JSON, or behind it in one safetensors file.

A safetensors file is the length of a header in 8 bytes, the header in JSON, and the numbers::

    | length, u64 | {"__metadata__": {...}, name: {dtype, shape, data_offsets}, ...} | numbers |

What is written is the same for the same tensors, to the byte: they stand in the order in which
they were given, those of four bytes first, so that each begins where numbers of its kind may.

Source of the format: https://huggingface.co/docs/safetensors.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from service.api.score_schemas import Tensor

MEDIA_TYPE = "application/x-safetensors"
Dtype = Literal["float16", "float32"]
# The name of a type in the format, and its bytes.
_TYPES = {"float16": ("F16", 2), "float32": ("F32", 4)}
_ALIGNMENT = 8


class TensorForm(Protocol):
    """How tensors stand in an answer."""

    def tensor(self, name: str, dtype: Dtype, shape: Sequence[int], numbers: bytes) -> Tensor:
        """What stands in the JSON of the answer for little-endian numbers."""


class Base64Tensors:
    """The numbers themselves, in base64."""

    def tensor(self, name: str, dtype: Dtype, shape: Sequence[int], numbers: bytes) -> Tensor:
        text = base64.b64encode(numbers).decode("ascii")
        return Tensor(b64=text, dtype=dtype, shape=list(shape))


class _Named(NamedTuple):
    name: str
    dtype: Dtype
    shape: Sequence[int]
    numbers: bytes


@dataclass(slots=True)
class NamedTensors:
    """A name, under which the numbers are in the file that `file` makes."""

    _tensors: list[_Named] = field(default_factory=list)

    def tensor(self, name: str, dtype: Dtype, shape: Sequence[int], numbers: bytes) -> Tensor:
        self._tensors.append(_Named(name, dtype, shape, numbers))
        return Tensor(name=name, dtype=dtype, shape=list(shape))

    def file(self, metadata: Mapping[str, str]) -> bytes:
        """All tensors so far, and ``metadata``."""
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        in_order = sorted(self._tensors, key=lambda each: -_TYPES[each.dtype][1])
        begin = 0
        for each in in_order:
            type_name, _ = _TYPES[each.dtype]
            end = begin + len(each.numbers)
            header[each.name] = {
                "dtype": type_name,
                "shape": list(each.shape),
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return b"".join(
            [len(text).to_bytes(8, "little"), text, *(each.numbers for each in in_order)]
        )
