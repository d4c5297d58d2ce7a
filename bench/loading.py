"""How fast presets are read from the page cache: ``python -m bench.loading``.

The demo model is written in three formats. The library reads each in process, checks included;
the service's second start checks the converted file, SHA-256 and all, and maps it. Beside each
figure stand a plain read and a plain SHA-256 of the same files, as the machine's own speed. All
take turns, and of several rounds the best counts; prints Markdown.
"""

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from model.presets.converted import ConvertedPreset, convert
from model.presets.hf_directory import HuggingFacePreset
from model.presets.hf_writer import write_hugging_face
from model.presets.keras_directory import KerasPreset
from model.presets.keras_writer import write_keras_preset
from model.presets.reader import PresetReader
from model.presets.resolve import DEMO, open_preset
from service.settings import Settings

_ROUNDS = 5
_CHUNK_BYTES = 1 << 20


def write_presets(directory: Path, demo: ConvertedPreset) -> dict[str, PresetReader]:
    """What the library reads, by what the table calls it."""
    keras, float32, bfloat16 = (directory / name for name in ("keras", "float32", "bfloat16"))
    tokenizer = demo.tokenizer_proto()
    assert tokenizer is not None, "the demo model has one"
    write_keras_preset(keras, demo.config, demo.arrays(), tokenizer)
    write_hugging_face(float32, demo.config, demo.arrays(), tokenizer)
    write_hugging_face(bfloat16, demo.config, demo.arrays(), tokenizer, dtype="bfloat16")
    return {
        "library: Keras preset, h5, float32": KerasPreset.open(keras),
        "library: safetensors, float32": HuggingFacePreset.open(float32),
        "library: safetensors, bfloat16": HuggingFacePreset.open(bfloat16),
    }


def read_arrays(reader: PresetReader) -> None:
    """What the library does: checks, then every array as float32, one after another."""
    for _ in reader.arrays():
        pass


def start_again(reader: PresetReader, cache_dir: Path) -> None:
    """What the service does once a preset is converted: weights checked and on the device."""
    preset = convert(reader, cache_dir)
    for _, array in preset.arrays():
        jax.device_put(array).block_until_ready()


def read_plainly(paths: list[Path]) -> None:
    buffer = bytearray(_CHUNK_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def hash_plainly(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")


def seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def best_seconds(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """The best of several rounds in which all take turns."""
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(_ROUNDS)]
    return {name: min(times[name] for times in rounds) for name in calls}


def main() -> None:
    settings = Settings()
    demo = open_preset(DEMO, settings.cache_dir)
    with tempfile.TemporaryDirectory(dir=settings.cache_dir) as directory:
        readers = write_presets(Path(directory), demo)
        files = {name: list(reader.source_files) for name, reader in readers.items()}
        calls: dict[str, Callable[[], None]] = {
            name: (lambda reader=reader: read_arrays(reader)) for name, reader in readers.items()
        }
        source = next(iter(readers.values()))
        cache_dir = Path(directory) / "cache"
        start = "service: second start, converted file"
        files[start] = [convert(source, cache_dir).directory / "model.safetensors"]
        calls[start] = lambda: start_again(source, cache_dir)
        for name, paths in files.items():
            calls[f"read {name}"] = lambda paths=paths: read_plainly(paths)
            calls[f"hash {name}"] = lambda paths=paths: hash_plainly(paths)
        load = Path("/proc/loadavg").read_text().split()[0]
        best = best_seconds(calls)
        sizes = {name: sum(path.stat().st_size for path in files[name]) for name in files}
    lines = [
        f"load before: {load}, after: {Path('/proc/loadavg').read_text().split()[0]}",
        "",
        "| what | MB | s | MB/s | SHA-256 alone, MB/s | plain read, MB/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, size in sizes.items():
        ways = (name, f"hash {name}", f"read {name}")
        speed, hashing, reading = (size / best[way] / 1e6 for way in ways)
        lines.append(
            f"| {name} | {size / 1e6:,.0f} | {best[name]:.2f} | {speed:,.0f} | {hashing:,.0f} | "
            f"{reading:,.0f} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
