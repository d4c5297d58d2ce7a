"""Messages as bytes: a length of four bytes, then msgpack of a list of messages.

A frame carries a list so that the worker can send everything that one turn made in one write.
Decoding is strict in both directions: an unknown field, tag or type, a frame beyond the limit, or
bytes that are not msgpack end the connection.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from service.protocol.messages import Command, Event
from service.protocol.training import TrainingCommand, TrainingEvent

MAX_FRAME_BYTES = 32 * 1024 * 1024
LENGTH_BYTES = 4

AnyCommand = Command | TrainingCommand
AnyEvent = Event | TrainingEvent

_encoder = msgspec.msgpack.Encoder()
_command_decoder = msgspec.msgpack.Decoder(list[AnyCommand])
_event_decoder = msgspec.msgpack.Decoder(list[AnyEvent])


class ProtocolError(Exception):
    """The peer sent something that is not a frame of this protocol."""


def encode(messages: Sequence[AnyCommand] | Sequence[AnyEvent]) -> bytes:
    """One frame.

    Raises:
        ProtocolError: The frame would exceed `MAX_FRAME_BYTES`.
    """
    body = _encoder.encode(messages)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"A frame of {len(body)} bytes exceeds {MAX_FRAME_BYTES}.")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def body_length(prefix: bytes) -> int:
    """Bytes that follow the four of ``prefix``.

    Raises:
        ProtocolError: More than `MAX_FRAME_BYTES`, so that a bad peer cannot make us allocate it.
    """
    length = int.from_bytes(prefix, "big")
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(f"A frame of {length} bytes exceeds {MAX_FRAME_BYTES}.")
    return length


def decode_commands(body: bytes) -> list[AnyCommand]:
    """The commands of one frame; raises `ProtocolError` if it holds anything else."""
    commands: list[AnyCommand] = _decode(_command_decoder, body)
    return commands


def decode_events(body: bytes) -> list[AnyEvent]:
    """The events of one frame; raises `ProtocolError` if it holds anything else."""
    events: list[AnyEvent] = _decode(_event_decoder, body)
    return events


def _decode(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError("A frame does not decode.") from error
