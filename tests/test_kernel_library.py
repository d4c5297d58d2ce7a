"""Which kernels a process has, why, and how the service says so."""

import io
import json
import shutil
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from model.kernels.build import build, compilers
from model.kernels.choice import KernelChoice
from model.kernels.exports import TARGETS
from model.kernels.library import Kernels, load_kernels
from model.kernels.sources import library_file
from service.protocol import messages
from service.settings import Settings
from service.startup_display import TerminalDisplay
from tests.kernel_copies import copy_kernels, handling_source, python, tiny_source
from tests.service_process import REPOSITORY, running_service

COMPILERS = list(compilers())
needs_a_compiler = pytest.mark.skipif(not COMPILERS, reason="no C++ compiler here")
SAY = "from model.kernels.library import load_kernels\nprint(load_kernels())\n"


def said(root, program=SAY):
    """What a new process of the copy under ``root`` prints."""
    process = python(root, "-c", program)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return stdout.strip()


@needs_a_compiler
def test_a_library_is_loaded_once_and_xla_calls_its_handlers(tmp_path):
    kernels = copy_kernels(tmp_path, handling_source())
    build(kernels, COMPILERS)
    program = f"""
import jax, jax.numpy as jnp
from model.kernels.library import load_kernels
kernels = load_kernels("native")
print(kernels, kernels.is_native, kernels.reason == "", kernels is load_kernels())
for target in {list(TARGETS)}:
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((), jnp.float32))
    try:
        print(jax.jit(call)())
    except jax.errors.JaxRuntimeError as error:
        print(str(error).splitlines()[0])
"""

    first, *refusals = said(tmp_path, program).splitlines()

    assert first == "avx2 True True True"
    assert len(refusals) == len(TARGETS)
    for refusal, symbol in zip(refusals, TARGETS.values(), strict=True):
        assert f"refused by {symbol}" in refusal


@needs_a_compiler
def test_a_library_of_other_sources_is_as_if_there_were_none(tmp_path):
    kernels = copy_kernels(tmp_path, tiny_source())
    build(kernels, COMPILERS)
    (kernels / "source" / "product.cc").write_text(tiny_source("avx512"))

    assert said(tmp_path) == "xla (not built for these sources; run make install)"


@needs_a_compiler
def test_a_processor_with_none_of_the_instruction_sets_takes_the_portable_path(tmp_path):
    build(copy_kernels(tmp_path, tiny_source("")), COMPILERS)

    assert said(tmp_path) == "xla (this processor has none of avx512, avx2, neon)"


def test_a_damaged_library_is_named_with_what_to_do(tmp_path):
    library = library_file(copy_kernels(tmp_path, tiny_source()))
    library.parent.mkdir()
    library.write_text("rubbish")

    line = said(tmp_path)
    assert line.startswith("xla (")
    assert line.endswith(f"delete {library} and run make install)")


def test_kernels_for_the_cpu_are_not_loaded_where_jax_computes_elsewhere(tmp_path):
    copy_kernels(tmp_path, tiny_source())
    elsewhere = "import jax\njax.default_backend = lambda: 'gpu'\n"

    assert said(tmp_path, elsewhere + SAY) == (
        "xla (JAX computes on gpu, and they are for the CPU)"
    )


def test_kernels_that_are_switched_off_are_not_looked_for():
    assert load_kernels("xla") == Kernels("xla", is_native=False, reason="switched off")


# --- the service ------------------------------------------------------------------------------


def test_protocol_settings_and_model_know_the_same_choices():
    choices = set(get_args(KernelChoice))

    assert set(get_args(messages.KernelChoice)) == choices
    assert set(get_args(get_type_hints(Settings)["kernels"])) == choices


def test_the_choice_reaches_the_engine_and_its_answer_the_operator(tmp_path):
    reason = "numbers need none; xla was asked for"
    with running_service(tmp_path, "--kernels=xla") as service:
        info = service.get("/info").json()
        metrics = service.get("/metrics").text.splitlines()
        ready = [line for line in service.log.splitlines() if '"event": "ready"' in line]

    assert (info["kernels"], info["kernels_reason"]) == ("none", reason)
    (series,) = [line for line in metrics if line.startswith("gemma_build_info{")]
    assert 'kernels="none"' in series
    assert [json.loads(line)["kernels"] for line in ready] == [f"none ({reason})"]


def test_a_terminal_shows_the_kernels_above_the_address():
    stream = io.StringIO()
    facts = {"preset": "tiny", "url": "http://x", "kernels": "xla (see [errors])"}
    TerminalDisplay(stream).ready(facts)

    assert stream.getvalue() == "kernels: xla (see [errors])\nReady: tiny on http://x\n"


def test_a_service_that_must_have_native_kernels_does_not_start_without_them(tmp_path):
    """A copy of the program that was never built."""
    ignored = shutil.ignore_patterns("_build", "__pycache__")
    for package in ("model", "service"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=ignored)
    words = [sys.executable, "-m", "service", "serve", "--port=0", "--preset=tiny"]
    words += ["--kernels=native", f"--data-dir={tmp_path}/d", f"--cache-dir={tmp_path}/c"]

    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    lines = [line for line in done.stderr.splitlines() if line.startswith("gemma-service: ")]
    assert lines == [
        "gemma-service: Native kernels were asked for (--kernels native) and there are none: "
        "not built for these sources; run make install."
    ]
    assert "Traceback" not in done.stderr
    assert done.returncode == 65
    assert not (tmp_path / "c" / "programs").exists()
