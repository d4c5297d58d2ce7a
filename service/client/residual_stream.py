"""What `/generate` and `/score` are told to do to the residual stream, and to look at of it."""

import base64
import struct
from collections.abc import Iterable, Sequence
from typing import Literal, NotRequired, TypeAlias, TypedDict

Positions: TypeAlias = Literal["all", "context", "target", "last"] | Sequence[int]
Operation: TypeAlias = Literal["add", "scale", "zero", "set", "project_out"]
CaptureDtype: TypeAlias = Literal["float16", "float32"]


class Vector(TypedDict):
    """One number for each of the residual stream, in base64: little-endian."""

    b64: str
    dtype: str
    shape: Sequence[int]


class Intervention(TypedDict):
    """A change of the residual stream; layer −1 is the embedding."""

    layers: Sequence[int]
    op: Operation
    positions: NotRequired[Positions]
    scale: NotRequired[float]
    vector: NotRequired[Vector | None]


class Capture(TypedDict):
    """What is told of the residual stream, after interventions."""

    layers: Sequence[int]
    positions: NotRequired[Positions]
    dtype: NotRequired[CaptureDtype]


def vector(numbers: Iterable[float]) -> Vector:
    """Numbers, of an array or a list, as an `Intervention` takes them."""
    given = [*map(float, numbers)]
    packed = struct.pack(f"<{len(given)}f", *given)
    return {
        "b64": base64.b64encode(packed).decode("ascii"),
        "dtype": "float32",
        "shape": [len(given)],
    }
