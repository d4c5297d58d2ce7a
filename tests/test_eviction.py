"""The cache of converted presets stays bounded, and takes nothing from a process that uses it."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from model.presets.converted import convert
from model.presets.keras_directory import KerasPreset

REPOSITORY = Path(__file__).parents[1]
TINY = REPOSITORY / "model" / "presets" / "tiny"
DAY_SECONDS = 24 * 3600

HOLDING = """
import pathlib, sys
from model.presets.converted import convert
from model.presets.keras_directory import KerasPreset

preset = convert(KerasPreset.open(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))
sys.stdout.write("held\\n")
sys.stdout.flush()
sys.stdin.read()
"""


@contextmanager
def held_by_another_process(source, cache_dir):
    command = [sys.executable, "-c", HOLDING, str(source), str(cache_dir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        yield
        process.stdin.close()
        assert process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two presets, and a cache that holds both. Nothing in it may be touched."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("source", "other"):
        shutil.copytree(TINY, folder / name)
        convert(KerasPreset.open(folder / name), folder / "cache")
    return folder


@pytest.fixture
def cache_dir(tmp_path, prepared):
    return Path(shutil.copytree(prepared / "cache", tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    """A preset for one test alone, which may touch it."""
    return Path(shutil.copytree(TINY, tmp_path / "source"))


def touch(source):
    os.utime(source / "model.weights.h5")


def last_used(entry, days_ago):
    then = time.time() - days_ago * DAY_SECONDS
    os.utime(entry / "preset.json", (then, then))


def converted(source, cache_dir):
    """The entry, which nobody holds any more."""
    return convert(KerasPreset.open(source), cache_dir).directory


def entries(cache_dir):
    return sorted(path for path in (cache_dir / "presets").iterdir() if path.name != ".lock")


def test_what_was_made_from_an_older_source_is_removed(cache_dir, source):
    others, before = entries(cache_dir), converted(source, cache_dir)
    touch(source)
    after = converted(source, cache_dir)
    assert entries(cache_dir) == sorted([*others, after])
    assert before != after


def test_it_stays_while_another_process_holds_it(tmp_path, source):
    with held_by_another_process(source, tmp_path):
        (held,) = entries(tmp_path)
        touch(source)
        after = converted(source, tmp_path)
        assert entries(tmp_path) == sorted([held, after])
    assert converted(source, tmp_path) == after
    assert entries(tmp_path) == [after]


def test_an_iterator_of_arrays_holds_the_entry_and_arrays_outlive_it(tmp_path, source):
    arrays = convert(KerasPreset.open(source), tmp_path).arrays()
    found = dict([next(arrays)])
    touch(source)
    after = converted(source, tmp_path)
    assert len(entries(tmp_path)) == 2
    found |= arrays
    assert converted(source, tmp_path) == after
    assert entries(tmp_path) == [after]
    expected = dict(KerasPreset.open(TINY).arrays())
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(("days", "stays"), [(29, True), (31, False)])
def test_what_nobody_used_for_a_month_is_removed(cache_dir, prepared, days, stays):
    old, new = converted(prepared / "other", cache_dir), converted(prepared / "source", cache_dir)
    last_used(old, days)
    converted(prepared / "source", cache_dir)
    assert entries(cache_dir) == sorted([old, new] if stays else [new])


def test_a_start_counts_as_use(cache_dir, prepared):
    old = converted(prepared / "other", cache_dir)
    last_used(old, 31)
    assert converted(prepared / "other", cache_dir) == old
    converted(prepared / "source", cache_dir)
    assert old in entries(cache_dir)


def test_what_another_process_holds_stays_however_long_it_runs(cache_dir, prepared):
    with held_by_another_process(prepared / "other", cache_dir):
        old = converted(prepared / "other", cache_dir)
        last_used(old, 100)
        converted(prepared / "source", cache_dir)
        assert old in entries(cache_dir)
    converted(prepared / "source", cache_dir)
    assert old not in entries(cache_dir)


def test_an_entry_without_a_manifest_goes_by_its_own_age(cache_dir, prepared):
    old = converted(prepared / "other", cache_dir)
    (old / "preset.json").unlink()
    converted(prepared / "source", cache_dir)
    assert old in entries(cache_dir)
    os.utime(old, (0, 0))
    converted(prepared / "source", cache_dir)
    assert old not in entries(cache_dir)


def test_a_warm_start_removes_what_a_killed_process_left(cache_dir, prepared):
    before = entries(cache_dir)
    dead, alive = (cache_dir / "presets" / f".converting-{name}" for name in ("dead", "alive"))
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(bytes(1000))
    alive.mkdir()
    descriptor = os.open(alive, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        converted(prepared / "source", cache_dir)
        assert entries(cache_dir) == sorted([alive, *before])
    finally:
        os.close(descriptor)


def test_only_entries_are_removed(cache_dir, prepared):
    precious = cache_dir / "presets" / "precious"
    precious.mkdir()
    os.utime(precious, (0, 0))
    converted(prepared / "source", cache_dir)
    assert precious in entries(cache_dir)
