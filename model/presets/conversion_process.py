"""Has a preset read in a process of its own, and watches that process.

Nothing that comes back is trusted: the answers are bounded and parsed strictly, and the file is
checked by the caller as if it had come with the preset. Whatever happens to the child, the caller
gets the file or one `PresetError`, within a time that follows from the size of the model.
"""

import dataclasses
import json
import math
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from model.config import GemmaConfig
from model.errors import PresetFileInvalid
from model.presets.confinement import Budget
from model.presets.conversion_child import GGUF, HUGGING_FACE, KERAS, Request
from model.presets.hf_directory import HuggingFacePreset
from model.presets.keras_directory import KerasPreset
from model.presets.reader import PresetReader
from model.presets.watched_process import WatchedProcess, running
from model.progress import Progress
from model.weight_names import num_parameters, weight_specs

# Slower than any disk or processor that this is meant for: who needs longer hangs.
_SLOWEST_BYTES_PER_SECOND = 10_000_000
_CHILD = "model.presets.conversion_child"


@dataclass(frozen=True, slots=True)
class ConversionLimits:
    """What reading a preset may take.

    Attributes:
        budget: What the kernel enforces.
        array_seconds: Until the next array must be there.
        all_seconds: Until everything must be written.
    """

    budget: Budget
    array_seconds: float
    all_seconds: float


def limits_for(config: GemmaConfig, num_files: int) -> ConversionLimits:
    """What a sound preset of this size needs, with room.

    Memory: at most four float32 copies of one array are alive at once (the last one, and the next
    as it is stored, as it is computed and as it is used), and libraries keep some beside.
    """
    output_bytes = 4 * num_parameters(config)
    largest_bytes = max(4 * math.prod(spec.shape) for spec in weight_specs(config))
    return ConversionLimits(
        Budget(
            memory_bytes=(256 << 20) + 4 * largest_bytes,
            cpu_seconds=30 + output_bytes // _SLOWEST_BYTES_PER_SECOND,
            file_bytes=(8 << 20) + output_bytes,
            open_files=32 + 2 * num_files,
        ),
        array_seconds=10.0 + largest_bytes / _SLOWEST_BYTES_PER_SECOND,
        all_seconds=60.0 + 2 * output_bytes / _SLOWEST_BYTES_PER_SECOND,
    )


def write_weights(
    reader: PresetReader,
    target: Path,
    *,
    progress: Progress,
    limits: ConversionLimits | None = None,
) -> None:
    """Has the weights of ``reader`` written to ``target`` as float32 safetensors.

    Args:
        reader: Says where the preset is; the child opens it anew.
        target: The file to be made. Its content is the child's claim.
        progress: Told the bytes done, in the phase "convert".
        limits: `limits_for` the reader's config unless given.

    Raises:
        PresetError: As the reader would, or because the child died or broke a limit.
        OSError: The file cannot be written.
    """
    kind, source = _place(reader)
    limits = limits or limits_for(reader.config, len(reader.source_files))
    request = Request(kind, str(source), str(target.absolute()), limits.budget, os.getpid())
    with running(_CHILD, request.to_json()) as process:
        _Conversion(process, reader, limits, progress).run()


def _place(reader: PresetReader) -> tuple[str, Path]:
    if isinstance(reader, KerasPreset):
        return KERAS, reader.directory.absolute()
    if isinstance(reader, HuggingFacePreset):
        return HUGGING_FACE, reader.directory.absolute()
    # Imported late: the presets above need no GGUF packages.
    from model.presets.gguf_file import GgufPreset

    assert isinstance(reader, GgufPreset), f"the child cannot open a {type(reader).__name__}"
    return GGUF, reader.header.path.absolute()


class _Conversion:
    """Follows one child from its start to its end."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: PresetReader,
        limits: ConversionLimits,
        progress: Progress,
    ) -> None:
        self._config = reader.config
        self._limits = limits
        self._progress = progress
        first = reader.source_files[0].parent
        self._files = f"{first} ({', '.join(path.name for path in reader.source_files[:4])})"
        self._watched = WatchedProcess(
            process, files=self._files, budget=limits.budget, all_seconds=limits.all_seconds
        )

    def run(self) -> None:
        """Returns when the child says that it has finished."""
        self._watched.await_start()
        total = 4 * num_parameters(self._config)
        end = time.monotonic() + self._limits.all_seconds
        done = 0
        while True:
            # When all arrays are there, nothing of the preset is read any more: the disk is busy.
            pause = self._limits.array_seconds if done < total else math.inf
            answer = self._watched.next_answer(min(time.monotonic() + pause, end))
            match answer:
                case {"event": "done", "bytes": int(now)} if done < now <= total:
                    done = now
                    self._progress("convert", float(done), float(total))
                case {"event": "config", "config": dict(config)}:
                    self._compare(config)
                case {"event": "finished"} if done == total:
                    return
                case _:
                    raise self._watched.failure(answer)

    def _compare(self, config: dict[object, object]) -> None:
        # Through JSON, because the child's went that way: tuples are lists there.
        if config != json.loads(json.dumps(dataclasses.asdict(self._config))):
            raise PresetFileInvalid(
                f"{self._files} changed while it was being converted; try again when its files "
                "are complete."
            )
