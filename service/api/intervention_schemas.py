"""`interventions` and `capture` of a request: their shapes, and what is in a vector.

Layers and the length of a vector depend on the model, positions on the text: the worker checks
them. A vector is decoded here, so that what crosses to the worker is numbers that are finite.
"""

import base64
import binascii
import math
import struct
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from service.api.strict_model import MAX_TOKENS, StrictModel, refusal
from service.protocol import messages as protocol

MAX_INTERVENTIONS = 4
MAX_CAPTURES = 8
# Of those that are listed.
MAX_POSITIONS = 64
MAX_SCALE = 1e6
# Of all that one answer captures, and with logits; the worker counts.
MAX_CAPTURE_BYTES = 8 * 1024 * 1024
MAX_TENSOR_BYTES = 16 * 1024 * 1024
_MAX_LAYERS = 256
_MAX_WIDTH = 65_536
# Base64 of so many numbers.
_MAX_B64 = 4 * (4 * _MAX_WIDTH // 3 + 2)
_NAMES = ("all", "context", "target", "last")
_FORMATS = {"float16": ("e", 2), "float32": ("f", 4)}
_WITH_VECTOR = ("add", "set", "project_out")
_WITH_SCALE = ("add", "scale")


def _check_positions(value: object) -> object:
    if isinstance(value, str):
        if value not in _NAMES:
            raise refusal((), "should be all, context, target, last or a list of positions")
        return value
    if not isinstance(value, list):
        raise refusal((), "should be all, context, target, last or a list of positions")
    if not 1 <= len(value) <= MAX_POSITIONS:
        raise refusal((), f"should have 1 to {MAX_POSITIONS} positions")
    _check_numbers(value, 0, MAX_TOKENS, "position")
    return value


def _check_layers(value: object) -> object:
    if not isinstance(value, list):
        raise refusal((), "should be a list of layers")
    if not 1 <= len(value) <= _MAX_LAYERS:
        raise refusal((), f"should have 1 to {_MAX_LAYERS} layers")
    _check_numbers(value, -1, _MAX_LAYERS, "layer")
    return value


def _check_numbers(value: list[Any], least: int, end: int, name: str) -> None:
    """Refuses what is no number of that range, or comes twice."""
    seen = set()
    for place, number in enumerate(value):
        # Not isinstance: a bool is an int.
        if type(number) is not int or not least <= number < end:
            raise refusal((place,), f"should be a {name} in [{least}, {end})")
        if number in seen:
            raise refusal((place,), f"should name each {name} once")
        seen.add(number)


def _numbers_schema(least: int, end: int, most: int) -> dict[str, Any]:
    return {
        "type": "array",
        "items": {"type": "integer", "minimum": least, "exclusiveMaximum": end},
        "minItems": 1,
        "maxItems": most,
        "uniqueItems": True,
    }


Layers = Annotated[
    list[int],
    PlainValidator(_check_layers),
    WithJsonSchema(_numbers_schema(-1, _MAX_LAYERS, _MAX_LAYERS)),
]
Positions = Annotated[
    str | list[int],
    PlainValidator(_check_positions),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": [*_NAMES]},
                _numbers_schema(0, MAX_TOKENS, MAX_POSITIONS),
            ]
        }
    ),
]

_LAYERS = "−1 is the embedding before scaling, i what block i leaves, before the final norm."


class Vector(StrictModel):
    """A direction of the residual stream."""

    b64: str = Field(max_length=_MAX_B64, description="Its numbers in base64, little-endian.")
    dtype: Literal["float16", "float32"]
    shape: list[int] = Field(
        min_length=1, max_length=1, description="One number: as many as the model's `hidden_dim`."
    )

    @model_validator(mode="after")
    def _check_numbers(self) -> "Vector":
        if not 1 <= self.shape[0] <= _MAX_WIDTH:
            raise refusal(("shape", 0), f"should be in [1, {_MAX_WIDTH}]")
        try:
            given = base64.b64decode(self.b64, validate=True)
        except (binascii.Error, ValueError):
            raise refusal(("b64",), "should be base64") from None
        _, size = _FORMATS[self.dtype]
        if len(given) != self.shape[0] * size:
            detail = f"should have the {self.shape[0] * size} bytes of shape and dtype"
            raise refusal(("b64",), detail)
        if not all(map(math.isfinite, self.numbers())):
            raise refusal(("b64",), "should have no NaN and no infinity")
        return self

    def numbers(self) -> tuple[float, ...]:
        """Once it is checked."""
        letter, size = _FORMATS[self.dtype]
        given = base64.b64decode(self.b64)
        return struct.unpack(f"<{len(given) // size}{letter}", given)


class Intervention(StrictModel):
    """A change of the residual stream x of some tokens at some layers."""

    layers: Layers = Field(description=_LAYERS)
    positions: Positions = Field(
        "all",
        description="In which tokens: `all`; `context`, the prompt, or what stands before a "
        "target; `target`, the completion, or the tokens of a target; `last`, the last one, which "
        "while decoding is the newest at each step; or up to 64 positions of the text, `<bos>` "
        "being 0, in the prompt if text is generated.",
    )
    op: Literal["add", "scale", "zero", "set", "project_out"] = Field(
        description="`add` x + scale·v · `scale` scale·x · `zero` 0 · `set` v · `project_out` "
        "x − (x·v̂)v̂, v̂ being v of length 1."
    )
    scale: float = Field(
        1.0, ge=-MAX_SCALE, le=MAX_SCALE, description="Of `add` and `scale`, which needs it."
    )
    vector: Vector | None = Field(None, description="v, for `add`, `set` and `project_out`.")

    @model_validator(mode="after")
    def _check_operation(self) -> "Intervention":
        if self.op in _WITH_VECTOR and self.vector is None:
            raise refusal(("vector",), f"is required for {self.op}")
        if self.op not in _WITH_VECTOR and self.vector is not None:
            raise refusal(("vector",), f"should be left out: {self.op} has none")
        if self.op not in _WITH_SCALE and "scale" in self.model_fields_set:
            raise refusal(("scale",), f"should be left out: {self.op} makes no use of it")
        if self.op == "scale" and "scale" not in self.model_fields_set:
            raise refusal(("scale",), "is required for scale")
        if self.op == "project_out" and self.vector and not any(self.vector.numbers()):
            raise refusal(("vector", "b64"), "should not be all zeros: it has no direction")
        return self

    def command(self) -> protocol.Intervention:
        """As the worker takes it."""
        vector = b""
        if self.vector is not None:
            numbers = self.vector.numbers()
            vector = struct.pack(f"<{len(numbers)}f", *numbers)
        return protocol.Intervention(
            self.op, tuple(self.layers), _positions(self.positions), self.scale, vector
        )


class Capture(StrictModel):
    """Which part of the residual stream is to be told, after interventions."""

    layers: Layers = Field(description=_LAYERS)
    positions: Positions = Field("last", description="Of which tokens, as for interventions.")
    dtype: Literal["float16", "float32"] = Field(
        "float32", description="`float16` turns what is beyond ±65,504 into infinity."
    )

    def command(self) -> protocol.Capture:
        """As the worker takes it."""
        return protocol.Capture(
            tuple(self.layers), _positions(self.positions), self.dtype == "float16"
        )


def _positions(given: str | list[int]) -> Any:
    return given if isinstance(given, str) else tuple(given)


Interventions = Annotated[list[Intervention], Field(max_length=MAX_INTERVENTIONS)]
