"""The child that reads presets: limited, watched, and never believed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from model.errors import PresetError, PresetFileInvalid, PresetFileMissing, UnsupportedPreset
from model.presets.conversion_process import (
    ConversionLimits,
    _Conversion,
    limits_for,
    write_weights,
)
from model.presets.keras_directory import KerasPreset
from model.presets.keras_writer import write_keras_preset
from model.progress import no_progress
from model.weight_names import weight_specs

REPOSITORY = Path(__file__).parents[1]
TINY = REPOSITORY / "model" / "presets" / "tiny"

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def source(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "source"))


@pytest.fixture
def reader(source):
    return KerasPreset.open(source)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A reader of one 67 MB array and small ones."""
    directory = tmp_path_factory.mktemp("large") / "preset"
    config = replace(KerasPreset.open(TINY).config, vocabulary_size=524_288, hidden_dim=32)
    arrays = ((spec.name, np.zeros(spec.shape, np.float32)) for spec in weight_specs(config))
    write_keras_preset(directory, config, arrays, b"not read here")
    return KerasPreset.open(directory)


def child():
    """The one child of this process that reads presets."""
    (process,) = (
        process
        for process in psutil.Process().children()
        if "model.presets.conversion_child" in process.cmdline()
    )
    return process


class AtFirstAnswer:
    """A `Progress` that does something with the child once."""

    def __init__(self, act):
        self._act = act
        self.pid = None
        self.seen = None

    def __call__(self, phase, done, total):
        if self.pid is None:
            self.pid = child().pid
            self.seen = self._act(self.pid)


def budgeted(reader, **changes):
    limits = limits_for(reader.config, len(reader.source_files))
    return replace(limits, budget=replace(limits.budget, **changes))


# --- what is written -----------------------------------------------------------------------------


def test_progress_counts_the_bytes_of_every_array(tmp_path, reader):
    calls = []
    write_weights(reader, tmp_path / "weights", progress=lambda *call: calls.append(call))
    sizes = [4.0 * array.size for _, array in reader.arrays()]
    assert calls == [("convert", done, 414_208.0) for done in np.cumsum(sizes)]


# --- what the source does wrong ------------------------------------------------------------------


def truncate(source):
    os.truncate(source / "model.weights.h5", 400_000)


def remove_weights(source):
    (source / "model.weights.h5").unlink()


def other_class(source):
    config = source / "config.json"
    config.write_text(config.read_text().replace("Gemma", "Llama"))


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (truncate, PresetFileInvalid),
        (remove_weights, PresetFileMissing),
        (other_class, UnsupportedPreset),
    ],
)
def test_errors_are_those_of_the_reader_itself(tmp_path, source, reader, damage, kind):
    damage(source)
    with pytest.raises(PresetError) as expected:
        list(KerasPreset.open(source).arrays())
    with pytest.raises(PresetError) as found:
        write_weights(reader, tmp_path / "weights", progress=no_progress)
    assert type(found.value) is type(expected.value) is kind
    assert str(found.value) == str(expected.value)


def test_a_config_that_changed_since_it_was_opened_is_refused(tmp_path, source, reader):
    config = source / "config.json"
    changed = re.sub(r'("layer_norm_epsilon"): 1e-0?6', r"\1: 1e-05", config.read_text())
    assert changed != config.read_text()
    config.write_text(changed)
    with pytest.raises(PresetFileInvalid, match="changed while it was being converted"):
        write_weights(reader, tmp_path / "weights", progress=no_progress)


# --- limits --------------------------------------------------------------------------------------


def test_limits_follow_from_the_model(reader):
    """103,552 parameters; the largest array is the embedding table of 512 x 32 numbers."""
    limits = limits_for(reader.config, 3)
    specs = {spec.name: spec.shape for spec in weight_specs(reader.config)}
    rows, width = specs["token_embedding/embeddings"]
    assert limits.budget.file_bytes == (8 << 20) + 414_208
    assert limits.budget.memory_bytes == (256 << 20) + 16 * rows * width
    assert limits.budget.cpu_seconds == 30
    assert limits.budget.open_files == 38
    assert limits.array_seconds < 10.1
    assert limits.all_seconds < 60.1


@needs_linux
def test_the_kernel_knows_the_limits_while_the_source_is_read(tmp_path, reader):
    def limits(pid):
        process = psutil.Process(pid)
        return {
            name: process.rlimit(getattr(psutil, name))
            for name in ("RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_AS")
        }

    watch = AtFirstAnswer(limits)
    write_weights(reader, tmp_path / "weights", progress=watch, limits=budgeted(reader))
    assert watch.seen["RLIMIT_FSIZE"] == (8_802_816, 8_802_816)
    assert watch.seen["RLIMIT_NOFILE"] == (38, 38)
    assert watch.seen["RLIMIT_CORE"] == (0, 0)
    soft, hard = watch.seen["RLIMIT_CPU"]
    assert 31 <= soft <= 60  # 30 s, and what the imports took
    assert hard == soft + 5
    soft, hard = watch.seen["RLIMIT_AS"]
    assert 268_697_600 < soft == hard < 268_697_600 + (1 << 30)  # and what the libraries take


@needs_linux
def test_memory_is_limited(tmp_path, large):
    with pytest.raises(PresetFileInvalid, match=r"needs more memory .* 33,554,432 bytes"):
        write_weights(
            large,
            tmp_path / "weights",
            progress=no_progress,
            limits=budgeted(large, memory_bytes=32 << 20),
        )


def test_the_size_of_the_file_is_limited(tmp_path, large):
    limits = budgeted(large, file_bytes=1 << 20)
    with pytest.raises(OSError, match="File too large"):
        write_weights(large, tmp_path / "weights", progress=no_progress, limits=limits)
    assert (tmp_path / "weights").stat().st_size == 1 << 20


@needs_linux
def test_there_is_no_network_where_the_kernel_grants_it(tmp_path, reader):
    probe = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(int(sys.argv[1], 0)) != 0)"
    is_granted = any(
        subprocess.run([sys.executable, "-c", probe, flags]).returncode == 0
        for flags in ("0x40000000", "0x50000000")
    )
    watch = AtFirstAnswer(lambda pid: os.readlink(f"/proc/{pid}/ns/net"))
    write_weights(reader, tmp_path / "weights", progress=watch)
    assert (watch.seen != os.readlink("/proc/self/ns/net")) is is_granted


def test_it_gets_no_credentials(tmp_path, reader, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    watch = AtFirstAnswer(lambda pid: psutil.Process(pid).environ())
    write_weights(reader, tmp_path / "weights", progress=watch)
    assert watch.seen.keys() <= {
        *("HOME", "LANG", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH", "PYTHONHOME"),
        *("PYTHONPATH", "TMPDIR", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"),
        *("LC_CTYPE", "KERAS_BACKEND"),  # which Python and this package set themselves
    }


# --- death ---------------------------------------------------------------------------------------


def test_a_child_that_hangs_is_killed_when_its_time_is_over(tmp_path, large):
    watch = AtFirstAnswer(lambda pid: os.kill(pid, signal.SIGSTOP))
    limits = replace(budgeted(large), array_seconds=1.0)
    began = time.monotonic()
    with pytest.raises(PresetFileInvalid, match=r"model\.weights\.h5.* stalled"):
        write_weights(large, tmp_path / "weights", progress=watch, limits=limits)
    assert time.monotonic() - began < 30
    assert not psutil.pid_exists(watch.pid)


def test_a_child_that_is_slow_all_the_way_is_killed_too(tmp_path, large):
    limits = replace(budgeted(large), all_seconds=0.001)
    with pytest.raises(PresetFileInvalid, match="stalled"):
        write_weights(large, tmp_path / "weights", progress=no_progress, limits=limits)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "was killed by the system, most likely for lack of memory"),
        (signal.SIGXCPU, "took more than 30 s of processor time"),
        (signal.SIGSEGV, "crashed the library .*SIGSEGV"),
    ],
)
def test_the_cause_of_death_is_told(tmp_path, reader, number, words):
    def kill(pid):
        os.kill(pid, signal.SIGSTOP)  # so that it cannot finish meanwhile
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)

    with pytest.raises(PresetFileInvalid, match=words) as found:
        write_weights(reader, tmp_path / "weights", progress=AtFirstAnswer(kill))
    assert str(reader.directory) in str(found.value)


KILLED = """
import os, pathlib, signal, sys
import psutil
from model.presets.conversion_process import write_weights
from model.presets.keras_directory import KerasPreset

def die(*call):
    (child,) = psutil.Process().children()
    child.suspend()
    sys.stdout.write(str(child.pid))
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)

reader = KerasPreset.open(pathlib.Path(sys.argv[1]))
write_weights(reader, pathlib.Path(sys.argv[2]), progress=die)
"""


@needs_linux
def test_the_child_dies_with_its_parent(tmp_path, source):
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "weights")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- nonsense ------------------------------------------------------------------------------------

STARTED = '{"event": "started"}\n'


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("", "did not start"),
        ('{"event": "finished"}\n', "did not start"),
        (STARTED, "ended with status 0"),
        (STARTED + "[1]\n", "must hold one JSON object"),
        (STARTED + "x" * 100_000, "talks nonsense"),
        (STARTED + '{"event": "finished"}\n', "went wrong"),
        (STARTED + '{"event": "done", "bytes": 414209}\n', "went wrong"),
        (STARTED + '{"event": "done", "bytes": 8}\n{"event": "done", "bytes": 8}\n', "went wrong"),
        (STARTED + '{"event": "done", "bytes": true}\n' * 2, "went wrong"),
        (STARTED + '{"event": "config", "config": {}}\n', "changed while"),
        (STARTED + '{"event": "failed", "error": "SystemExit", "message": "x"}\n', "unknown error"),
    ],
    ids=range(11),
)
def test_a_child_that_was_taken_over_can_only_fail(reader, answers, words):
    limits: ConversionLimits = limits_for(reader.config, 1)
    program = "import sys; sys.stdout.write(sys.argv[1])"
    with subprocess.Popen(
        [sys.executable, "-c", program, answers], stdout=subprocess.PIPE
    ) as process:
        with pytest.raises(PresetError, match=words):
            _Conversion(process, reader, limits, no_progress).run()
        process.kill()
