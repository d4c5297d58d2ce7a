"""Has a ``.lora.h5`` file read in a process of its own, and believes nothing that comes back."""

import os
import re
import time

from model.adapter_exchange.keras_child import Request
from model.adapter_exchange.keras_datasets import LoraDatasets
from model.adapter_shapes import MAX_RANK
from model.errors import PresetFileInvalid
from model.presets.confinement import Budget
from model.presets.safetensors_content import read_tensors
from model.presets.safetensors_header import header_of
from model.presets.watched_process import WatchedProcess, running

_CHILD = "model.adapter_exchange.keras_child"
_SLOWEST_BYTES_PER_SECOND = 10_000_000
# What the answer has beside the numbers of the file.
_HEADER_BYTES = 1 << 20
_TENSOR = re.compile(r"([1-9][0-9]{0,5})\.[ab]")


def read_elsewhere(content: bytes, source: str) -> LoraDatasets:
    """The content of a file, read by a child under limits; ``source`` names it in errors.

    Raises:
        PresetFileInvalid: It is no such file, or the child died or broke a limit.
        PresetError: The child did not start.
    """
    seconds = len(content) // _SLOWEST_BYTES_PER_SECOND
    budget = Budget(
        # The arrays, what they are packed into, and the library's own.
        memory_bytes=(256 << 20) + 4 * len(content),
        cpu_seconds=30 + seconds,
        file_bytes=0,
        open_files=32,
    )
    request = Request(source, budget, os.getpid()).to_line()
    all_seconds = 60.0 + 2 * seconds
    with running(_CHILD, request + content) as process:
        watched = WatchedProcess(process, files=source, budget=budget, all_seconds=all_seconds)
        watched.await_start()
        end = time.monotonic() + all_seconds
        answer = watched.next_answer(end)
        match answer:
            case {"event": "finished", "bytes": int(num_bytes)} if (
                0 < num_bytes <= len(content) + _HEADER_BYTES
            ):
                tensors = watched.next_content(num_bytes, end)
            case _:
                raise watched.failure(answer)
        if tensors is None:
            raise watched.failure(None)
    return _datasets(tensors, source)


def _datasets(tensors: bytes, source: str) -> LoraDatasets:
    """What the child claims, taken apart as if a stranger had sent it."""
    header = header_of(tensors, source)
    rank = header.metadata.get("rank", "")
    if not re.fullmatch(r"[1-9][0-9]{0,3}", rank) or int(rank) > MAX_RANK:
        raise PresetFileInvalid(f"{source}: its rank is {rank!r:.20}.")
    matches = [_TENSOR.fullmatch(name) for name in header.entries]
    places = sorted({int(match[1]) for match in matches if match})
    names = [f"{place}.{name}" for place in places for name in "ab"]
    arrays = read_tensors(tensors, header, {name: header.shape(name) for name in names})
    pairs = {place: (arrays[f"{place}.a"], arrays[f"{place}.b"]) for place in places}
    return LoraDatasets(int(rank), pairs)
