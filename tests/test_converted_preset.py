"""The cache of converted presets: whole or absent, whoever dies, and never trusted blindly."""

import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from model.errors import PresetError, PresetFileInvalid, PresetNotFound, UnsupportedPreset
from model.presets.converted import convert
from model.presets.keras_directory import KerasPreset
from model.presets.resolve import open_preset

REPOSITORY = Path(__file__).parents[1]
TINY = REPOSITORY / "model" / "presets" / "tiny"


class Conversions:
    """A `Progress` that counts how often a source is converted, and can act meanwhile."""

    def __init__(self, meanwhile=lambda: None):
        self.num_done = 0
        self._meanwhile = [meanwhile]

    def __call__(self, phase, done, total):
        assert phase == "convert"
        if self._meanwhile:
            self._meanwhile.pop()()
        self.num_done += done == total


@pytest.fixture
def reader():
    return KerasPreset.open(TINY)


@pytest.fixture
def source(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "source"))


@pytest.fixture(scope="module")
def converted_once(tmp_path_factory):
    cache_dir = tmp_path_factory.mktemp("converted-once")
    convert(KerasPreset.open(TINY), cache_dir)
    return cache_dir


@pytest.fixture
def full_cache(tmp_path, converted_once):
    """A cache with the tiny preset in it, for one test alone."""
    return Path(shutil.copytree(converted_once, tmp_path / "full-cache"))


def assert_holds_tiny(preset):
    expected = dict(KerasPreset.open(TINY).arrays())
    found = dict(preset.arrays())
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert preset.tokenizer_proto() == (TINY / "assets/tokenizer/vocabulary.spm").read_bytes()


def names_in_cache(cache_dir):
    return sorted(path.name for path in (cache_dir / "presets").iterdir() if path.name != ".lock")


# --- an entry ------------------------------------------------------------------------------------


def test_a_converted_preset_holds_what_its_source_holds(tmp_path, reader):
    assert_holds_tiny(convert(reader, tmp_path))


def test_a_second_start_reads_no_source_weights(tmp_path, reader):
    conversions = Conversions()
    first = convert(reader, tmp_path, progress=conversions)
    second = convert(reader, tmp_path, progress=conversions)
    assert first == second
    assert conversions.num_done == 1


def test_a_preset_without_a_tokenizer_is_converted_without_one(tmp_path, source):
    shutil.rmtree(source / "assets")
    for name in ("tokenizer.json", "preprocessor.json", "task.json"):
        (source / name).unlink(missing_ok=True)
    first, second = (convert(KerasPreset.open(source), tmp_path) for _ in range(2))
    assert first.tokenizer_proto() is None
    assert second.tokenizer_proto() is None
    assert sorted(os.listdir(first.directory)) == ["model.safetensors", "preset.json"]


def test_arrays_lie_where_jax_can_use_them_without_a_copy(full_cache, reader):
    """The tiny preset's tensors have multiples of 64 bytes, as those of every Gemma have."""
    mapped = dict(convert(reader, full_cache).arrays())
    for name, array in mapped.items():
        on_device = jax.device_put(array)
        assert on_device.unsafe_buffer_pointer() == array.ctypes.data, name


def test_only_the_owner_can_look_into_the_cache(tmp_path, reader):
    cache_dir = tmp_path / "new" / "cache"
    convert(reader, cache_dir)
    paths = [cache_dir.parent, cache_dir, *cache_dir.rglob("*")]
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_progress_counts_bytes_up_to_the_total(tmp_path, reader):
    calls = []
    preset = convert(reader, tmp_path, progress=lambda *call: calls.append(call))
    list(preset.arrays(progress=lambda *call: calls.append(call)))
    for phase in ("convert", "load"):
        done = [call[1] for call in calls if call[0] == phase]
        assert done == sorted(done)
        assert done[-1] == 4 * 103_552


def test_the_digest_depends_on_contents_and_not_on_the_place(tmp_path, reader, source):
    here, there = convert(reader, tmp_path), convert(KerasPreset.open(source), tmp_path)
    assert here.preset_digest == there.preset_digest
    assert here.directory != there.directory


def test_a_changed_source_is_converted_anew(tmp_path, source):
    before = convert(KerasPreset.open(source), tmp_path)
    config = source / "config.json"
    config.write_text(config.read_text().replace('"dropout": 0', '"dropout": 0.1'))
    after = convert(KerasPreset.open(source), tmp_path)
    assert before.preset_digest != after.preset_digest


# --- death and company ---------------------------------------------------------------------------

DYING = """
import os, pathlib, signal, sys
from model.presets.resolve import open_preset

cache_dir, instant, countdown = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def dying(function):
    def wrapper(*args, **kwargs):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper

progress = dying(lambda *call: None) if instant == "progress" else lambda *call: None
if instant == "fsync":
    os.fsync = dying(os.fsync)
if instant == "rename":
    pathlib.Path.rename = dying(pathlib.Path.rename)
open_preset("tiny", cache_dir, progress=progress)
"""


@pytest.mark.parametrize(
    ("instant", "countdown", "is_converted"),
    [
        ("progress", 1, False),
        ("progress", 60, False),
        ("fsync", 1, False),  # the tokenizer
        ("fsync", 2, False),  # the manifest
        ("rename", 1, False),
        ("fsync", 4, True),  # the directory around the new entry
    ],
)
def test_being_killed_leaves_a_whole_entry_or_none(tmp_path, instant, countdown, is_converted):
    command = [sys.executable, "-c", DYING, str(tmp_path), instant, str(countdown)]
    assert subprocess.run(command, cwd=REPOSITORY).returncode == -signal.SIGKILL
    (left_over,) = names_in_cache(tmp_path)
    assert left_over.startswith(".converting-") is not is_converted

    conversions = Conversions()
    preset = convert(KerasPreset.open(TINY), tmp_path, progress=conversions)

    assert conversions.num_done == (0 if is_converted else 1)
    assert_holds_tiny(preset)
    assert names_in_cache(tmp_path) == [preset.directory.name]


SLOW = """
import pathlib, sys, time
from model.presets.resolve import open_preset

def progress(*call):
    time.sleep(0.005)

sys.stdout.write(str(open_preset("tiny", pathlib.Path(sys.argv[1]), progress=progress)))
"""


def test_two_processes_at_once_end_with_the_same_entry(tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    processes = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) for _ in range(2)
    ]
    first, second = (process.communicate(timeout=60)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert first == second
    assert len(names_in_cache(tmp_path)) == 1


def test_whoever_is_slower_uses_the_entry_of_the_other(tmp_path, reader):
    meanwhile = Conversions(lambda: convert(reader, tmp_path))
    preset = convert(reader, tmp_path, progress=meanwhile)
    assert meanwhile.num_done == 1
    assert_holds_tiny(preset)
    assert names_in_cache(tmp_path) == [preset.directory.name]


def test_a_source_that_changes_meanwhile_is_refused(tmp_path, source):
    touch = Conversions(lambda: os.utime(source / "model.weights.h5", (1, 1)))
    with pytest.raises(PresetFileInvalid, match="changed while"):
        convert(KerasPreset.open(source), tmp_path, progress=touch)
    assert names_in_cache(tmp_path) == []


def test_a_source_that_cannot_be_read_leaves_nothing_behind(tmp_path, source):
    os.truncate(source / "model.weights.h5", 400_000)
    with pytest.raises(PresetFileInvalid, match=r"model\.weights\.h5"):
        convert(KerasPreset.open(source), tmp_path)
    assert names_in_cache(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path, reader):
    (tmp_path / "file").write_text("")
    with pytest.raises(PresetError, match="cannot be converted in"):
        convert(reader, tmp_path / "file")


# --- damage --------------------------------------------------------------------------------------


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def with_flipped_manifest(entry):
    manifest = entry / "preset.json"
    flip(manifest, manifest.read_bytes().index(b'"preset_digest": "') + 20)


def with_half_a_manifest(entry):
    os.truncate(entry / "preset.json", 500)


def without_manifest(entry):
    (entry / "preset.json").unlink()


def with_manifest_of_a_later_format(entry):
    (entry / "preset.json").write_text(json.dumps({"sha256": "0", "content": {}}))


def with_truncated_weights(entry):
    os.truncate(entry / "model.safetensors", 300_000)


def with_longer_weights(entry):
    with (entry / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def with_one_flipped_weight(entry):
    flip(entry / "model.safetensors", 300_000)


def with_flipped_tokenizer(entry):
    flip(entry / "tokenizer.spm", 100)


def without_tokenizer(entry):
    (entry / "tokenizer.spm").unlink()


def with_linked_weights(entry):
    (entry / "model.safetensors").rename(entry.parent.parent / "elsewhere")
    (entry / "model.safetensors").symlink_to(entry.parent.parent / "elsewhere")


def with_a_file_in_its_place(entry):
    shutil.rmtree(entry)
    entry.write_text("")


@pytest.mark.parametrize(
    "damage", [v for n, v in sorted(globals().items()) if n.startswith(("with_", "without_"))]
)
def test_a_damaged_entry_is_logged_and_converted_again_once(full_cache, reader, caplog, damage):
    (entry,) = names_in_cache(full_cache)
    damage(full_cache / "presets" / entry)

    conversions = Conversions()
    with caplog.at_level(logging.WARNING):
        preset = convert(reader, full_cache, progress=conversions)

    assert_holds_tiny(preset)
    assert caplog.text.count("thrown away") == 1
    convert(reader, full_cache, progress=conversions)
    assert conversions.num_done == 1
    assert names_in_cache(full_cache) == [entry]


# --- names ---------------------------------------------------------------------------------------


def test_tiny_is_a_name(tmp_path):
    assert_holds_tiny(open_preset("tiny", tmp_path))


def test_an_unknown_name_is_an_error_that_says_what_a_preset_may_be(tmp_path):
    with pytest.raises(PresetNotFound, match=r"'gemma9_1t'.*directory,? or a \.gguf file"):
        open_preset("gemma9_1t", tmp_path)


@pytest.mark.parametrize("suffix", [".keras", ".bin", ".pt", ".pkl", ".npy", ".h5", ".zip", ""])
def test_other_files_are_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"never opened")
    with pytest.raises(UnsupportedPreset, match=path.name):
        open_preset(str(path), tmp_path)
