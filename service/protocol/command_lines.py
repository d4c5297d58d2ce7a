"""What a command of the worker process prints, one JSON object a line.

``python -m service.worker presets|fetch|export`` prints any number of `Advanced`; then the result,
`Listed` for every preset, `Fetched` or `Exported`; or `CommandFailed` instead. If the process dies,
nothing says so but its status.
"""

from typing import Literal

import msgspec


class CommandLine(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all lines; the class name is the tag."""


class Advanced(CommandLine, frozen=True):
    """How far one phase is, in bytes."""

    phase: Literal["download", "convert", "write"]
    done: float
    total: float


class Listed(CommandLine, frozen=True):
    """One preset that has a name.

    Attributes:
        name: What ``serve`` and ``fetch`` take.
        source: Where it comes from: a handle of Kaggle, or "package" if pip has brought it.
        num_parameters: Of the model.
        download_bytes: About: two bytes a parameter, as most are published. 0 for a package.
        float32_bytes: Of the weights in memory; the KV cache and work space come on top.
        bfloat16_bytes: The same, with two bytes a weight.
        context_tokens: Of prompt and completion together, for the next number.
        kv_cache_bytes_per_slot: Keys and values of one sequence, in float32.
        is_instruct: Tuned to follow instructions.
        is_cached: Here, complete: serving it needs no network.
        cached_bytes: Of its downloaded files, if there are any.
    """

    name: str
    source: str
    num_parameters: int
    download_bytes: int
    float32_bytes: int
    bfloat16_bytes: int
    context_tokens: int
    kv_cache_bytes_per_slot: int
    is_instruct: bool
    is_cached: bool
    cached_bytes: int | None


class Fetched(CommandLine, frozen=True):
    """A preset is here and converted.

    Attributes:
        was_here: Nothing had to be downloaded or converted.
        directory: With the preset's files.
        num_bytes: Of these files.
        converted_directory: What ``serve`` maps.
        converted_bytes: Of the files there.
    """

    was_here: bool
    directory: str
    num_bytes: int
    converted_directory: str
    converted_bytes: int


class Exported(CommandLine, frozen=True):
    """A directory was written."""

    num_files: int
    num_bytes: int


class CommandFailed(CommandLine, frozen=True):
    """It cannot be done: the exit status, and one line for a person."""

    status: int
    message: str


Result = Listed | Fetched | Exported
AnyLine = Advanced | Listed | Fetched | Exported | CommandFailed

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyLine] = msgspec.json.Decoder(AnyLine)


def encode(line: AnyLine) -> bytes:
    """The line, with its end."""
    return _encoder.encode(line) + b"\n"


def decode(line: bytes) -> AnyLine:
    """The inverse of `encode`. Raises `msgspec.DecodeError`."""
    return _decoder.decode(line)
