"""The C++ of the kernels under sanitizers: 10,000 random shapes, and work shared among threads."""

import os
import subprocess
from pathlib import Path

import pytest

from model.kernels.build import compilers
from model.kernels.exports import INSTRUCTION_SETS
from model.kernels.library import load_kernels
from model.kernels.sources import DIRECTORY
from tests.native_kernels import needs_a_compiler

pytestmark = needs_a_compiler
SOURCE = DIRECTORY / "source"
PROGRAMS = Path(__file__).parent / "kernels"
NUM_SHAPES = 10_000
# Those that do not talk to XLA.
UNITS = [*(SOURCE / f"{name}.cc" for name in ("plain", *INSTRUCTION_SETS)), PROGRAMS / "fuzz.cc"]


def compiling(output, *words):
    """A compiler of the system at work, with an eye on memory as -O1 leaves it."""
    compiler = next(found for found in compilers() if found.name != "ziglang")
    flags = ("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-pthread", "-I", str(SOURCE))
    return subprocess.Popen(
        [*compiler.words, *flags, *map(str, words), "-o", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*compilations):
    for compilation in compilations:
        said, _ = compilation.communicate()
        assert compilation.returncode == 0, said


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz")
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    objects = {unit: directory / f"{unit.stem}.o" for unit in UNITS}
    finish(*(compiling(file, *sanitizers, "-c", unit) for unit, file in objects.items()))
    finish(compiling(directory / "fuzz", *sanitizers, *objects.values()))
    return directory / "fuzz"


def run(program, *words):
    # Leaks are not looked for: that needs to trace processes, which containers may not.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    words = [program, *map(str, words)]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def names(fuzz):
    """Of the instruction sets of this processor."""
    _, _, *names = run(fuzz, 0, 0).stdout.split()
    return names


def test_ten_thousand_shapes_give_the_bits_of_plain_code_and_touch_nothing_else(fuzz, names):
    done = run(fuzz, NUM_SHAPES, 20261123)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{NUM_SHAPES} shapes {' '.join(names)}\n"
    # What the library finds on this processor was among them.
    assert load_kernels().name in (*names, "xla")


def test_a_number_read_too_far_would_be_noticed(fuzz, names):
    for name in ("plain", *names):
        for layout in ("malloc", "page"):
            done = run(fuzz, "beyond", name, layout)
            assert done.returncode != 0, (name, layout)
            assert "ERROR: AddressSanitizer" in done.stderr


def test_threads_share_out_work_without_a_race(tmp_path):
    program = tmp_path / "shared_work"
    finish(compiling(program, "-fsanitize=thread", PROGRAMS / "shared_work.cc"))

    done = run(program)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "4212 calls\n")

    faulty = run(program, "faulty")
    assert faulty.returncode != 0
    assert "data race" in faulty.stderr
