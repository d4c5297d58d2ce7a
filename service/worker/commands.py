"""Commands that need the model and end by themselves: ``python -m service.worker fetch ...``.

Started by `service.command_process`, which shows what they print; see
`service.protocol.command_lines`.
"""

import argparse
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import PresetDownloadFailed, PresetError, PresetNotFound, UnsupportedPreset
from model.presets import demo, hubs
from model.presets.converted import ConvertedPreset, convert
from model.presets.hf_writer import write_hugging_face
from model.presets.keras_directory import KerasPreset
from model.presets.keras_preprocessing import read_preprocessing
from model.presets.keras_writer import write_keras_preset
from model.presets.reader import PresetReader
from model.presets.resolve import DEMO, IS_INSTRUCT, PRESET_NAMES, TINY, open_reader
from model.presets.table import BUILTIN_PRESETS, BuiltinPreset, memory_bytes
from model.slot_memory import kv_cache_bytes
from model.weight_names import num_parameters
from service.exit_status import ExitStatus
from service.logs import log_to_stderr
from service.protocol.command_lines import (
    Advanced,
    AnyLine,
    CommandFailed,
    Exported,
    Fetched,
    Listed,
    encode,
)
from service.worker.parent import die_with_parent

_PROGRESS_SECONDS = 0.1
# As of `GemmaCausalLM.save_to_preset`.
_KERAS_SHARD_BYTES = 10_000_000_000
_SOURCE_PACKAGE = "package"

log = logging.getLogger("service.worker")


class _Lines:
    """The way to the parent: what was stdout, so that no library can print between."""

    def __init__(self) -> None:
        self._pipe = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        self._last: tuple[str, float] = ("", 0.0)
        self._is_stopped = False

    def send(self, line: AnyLine) -> None:
        self._pipe.write(encode(line))

    def stop(self, number: int, frame: FrameType | None) -> None:
        """A handler of signals: ends the command as Ctrl-C does, and removes what is half made."""
        self._is_stopped = True
        raise KeyboardInterrupt

    def progress(self, phase: str, done: float, total: float) -> None:
        """A `model.progress.Progress`."""
        if self._is_stopped:
            # Once more: Python ignores what is raised amid the end of an object, of which h5py
            # makes many.
            raise KeyboardInterrupt
        last_phase, last_time = self._last
        now = time.monotonic()
        if phase == last_phase and done < total and now - last_time < _PROGRESS_SECONDS:
            return
        self._last = (phase, now)
        self.send(Advanced(phase, done, total))  # type: ignore[arg-type]


def main(words: Sequence[str]) -> int:
    """Runs one command; returns its exit status."""
    arguments = _parser().parse_args(words)
    die_with_parent(arguments.parent)
    lines = _Lines()
    log_to_stderr(arguments.log_level)
    # The parent's way to say that it is over.
    signal.signal(signal.SIGTERM, lines.stop)
    try:
        arguments.run(arguments, lines)
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    except _CannotWrite as error:
        return _fail(lines, ExitStatus.CANNOT_CREATE, str(error))
    except PresetDownloadFailed as error:
        return _fail(lines, ExitStatus.UNAVAILABLE, str(error))
    except PresetError as error:
        return _fail(lines, ExitStatus.BAD_PRESET, str(error))
    except Exception as error:
        log.exception("%s failed", arguments.command)
        detail = f"{arguments.command} failed: {type(error).__name__}. The log has the details."
        return _fail(lines, ExitStatus.BUG, detail)
    return ExitStatus.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service.worker")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(
        name: str, run: Callable[[Any, _Lines], None], *positionals: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name)
        added.add_argument("--parent", type=int, required=True)
        added.add_argument("--log-level", default="INFO")
        added.add_argument("--cache-dir", type=Path, required=True)
        for positional in positionals:
            added.add_argument(positional)
        added.set_defaults(run=run)
        return added

    command("presets", _list_presets).add_argument("--context-tokens", type=int, required=True)
    command("fetch", _fetch, "name")
    export = command("export", _export, "source", "directory")
    export.add_argument("--format", choices=("keras", "hugging-face", "peft"), required=True)
    export.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    export.add_argument("--adapter", type=Path)
    export.add_argument("--merged", action="store_true")
    return parser


def _fail(lines: _Lines, status: ExitStatus, message: str) -> ExitStatus:
    lines.send(CommandFailed(status, message))
    return status


# --- presets ----------------------------------------------------------------------------------


def _list_presets(arguments: argparse.Namespace, lines: _Lines) -> None:
    for name in PRESET_NAMES:
        lines.send(_listed(name, arguments.cache_dir, arguments.context_tokens))


def _listed(name: str, cache_dir: Path, max_context_tokens: int) -> Listed:
    published = BUILTIN_PRESETS.get(name)
    config = published.config if published else open_reader(name, cache_dir).config
    in_package = name == TINY or (name == DEMO and _demo_is_here(cache_dir))
    is_published = published is not None and not in_package
    cached_bytes = hubs.cached_bytes(name, cache_dir) if is_published else None
    # What a slot holds at most: nobody may ask for more than the model was trained for.
    context_tokens = min(max_context_tokens, config.context_tokens)
    return Listed(
        name=name,
        source=_source(published, in_package),
        num_parameters=num_parameters(config),
        # As most of the published presets are stored.
        download_bytes=memory_bytes(config, "bfloat16") if is_published else 0,
        float32_bytes=memory_bytes(config, "float32"),
        bfloat16_bytes=memory_bytes(config, "bfloat16"),
        context_tokens=context_tokens,
        kv_cache_bytes_per_slot=kv_cache_bytes(config, context_tokens),
        is_instruct=IS_INSTRUCT[name],
        is_cached=in_package or cached_bytes is not None,
        cached_bytes=cached_bytes,
    )


def _source(published: BuiltinPreset | None, in_package: bool) -> str:
    return _SOURCE_PACKAGE if published is None or in_package else published.handle


def _demo_is_here(cache_dir: Path) -> bool:
    """Whether the demo model needs no network: its packages are installed, or were once."""
    assembled = cache_dir / "downloads" / demo.FILE_NAME
    if assembled.is_file() and assembled.stat().st_size == demo.FILE_BYTES:
        return True
    try:
        demo.part_paths()
    except PresetNotFound:
        return False
    return True


# --- fetch ------------------------------------------------------------------------------------


def _fetch(arguments: argparse.Namespace, lines: _Lines) -> None:
    phases: set[str] = set()

    def progress(phase: str, done: float, total: float) -> None:
        phases.add(phase)
        lines.progress(phase, done, total)

    reader = open_reader(arguments.name, arguments.cache_dir, progress=progress)
    preset = convert(reader, arguments.cache_dir, progress=progress)
    lines.send(
        Fetched(
            # What is converted is known by its files, so new ones would have been converted.
            was_here="convert" not in phases,
            directory=str(_source_directory(reader)),
            num_bytes=_num_bytes(reader.source_files),
            converted_directory=str(preset.directory),
            converted_bytes=_num_bytes(_files_below(preset.directory)),
        )
    )


def _source_directory(reader: PresetReader) -> Path:
    """The one that holds all files; a Keras preset has its tokenizer in a folder of its own."""
    return Path(os.path.commonpath([path.absolute().parent for path in reader.source_files]))


def _files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def _num_bytes(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


# --- export -----------------------------------------------------------------------------------


class _CannotWrite(Exception):
    """The target is there already, or its disk refuses. The message is one clear line."""


def _export(arguments: argparse.Namespace, lines: _Lines) -> None:
    reader = open_reader(arguments.source, arguments.cache_dir, progress=lines.progress)
    target = Path(arguments.directory)
    try:
        if arguments.adapter is not None and not arguments.merged:
            _write_adapter(reader, target, arguments)
        else:
            # Not from the reader: files of strangers are read by the process that converts, and no
            # other.
            preset = convert(reader, arguments.cache_dir, progress=lines.progress)
            _write(preset, reader, target, arguments, lines)
    except PresetError as error:
        if type(error) is not PresetError:
            raise
        # The writers call by that name what concerns the target and no preset.
        raise _CannotWrite(str(error)) from error
    written = [target] if target.is_file() else _files_below(target)
    lines.send(Exported(num_files=len(written), num_bytes=_num_bytes(written)))


def _write(
    preset: ConvertedPreset,
    reader: PresetReader,
    target: Path,
    arguments: argparse.Namespace,
    lines: _Lines,
) -> None:
    def loaded(phase: str, done: float, total: float) -> None:
        lines.progress("write", done, total)

    arrays: Iterable[tuple[str, NDArray[np.float32]]] = preset.arrays(progress=loaded)
    if arguments.adapter is not None:
        # Imported late: with JAX, which most commands need not.
        from model.adapter_exchange.files import open_adapter
        from model.adapter_exchange.merged import merged_arrays

        arrays = merged_arrays(arrays, open_adapter(arguments.adapter, preset.config))
    tokenizer_proto = preset.tokenizer_proto()
    if arguments.format == "keras":
        packing = read_preprocessing(reader.directory) if isinstance(reader, KerasPreset) else None
        write_keras_preset(
            target,
            preset.config,
            arrays,
            tokenizer_proto,
            preprocessing=packing,
            dtype=arguments.dtype,
            max_shard_bytes=_KERAS_SHARD_BYTES,
        )
        return
    if tokenizer_proto is None:
        raise UnsupportedPreset(
            f"{arguments.source!r:.200} has no tokenizer, which a Hugging Face directory needs. "
            "Use --format keras, or add the tokenizer to the preset."
        )
    write_hugging_face(target, preset.config, arrays, tokenizer_proto, dtype=arguments.dtype)


def _write_adapter(reader: PresetReader, target: Path, arguments: argparse.Namespace) -> None:
    from model.adapter_exchange.files import export_directory, export_file, open_adapter

    adapter = open_adapter(arguments.adapter, reader.config)
    if arguments.format == "peft":
        export_directory(adapter, target, reader.config)
        return
    try:
        export_file(adapter, target, "keras", reader.config)
    except OSError as error:
        raise _CannotWrite(f"{target} cannot be written: {error.strerror or error}.") from error
