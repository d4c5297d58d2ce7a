"""Copies of `model.kernels` with tiny sources, where builds and damage concern nobody else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from model.kernels.exports import TARGETS
from model.kernels.sources import DIRECTORY

_EXPORTED = 'extern "C" __attribute__((visibility("default")))'


def tiny_source(instruction_set: str = "avx2", more: str = "") -> str:
    """Functions that can be found and not called, but for the one that names an instruction set."""
    handlers = "".join(f"{_EXPORTED} void {symbol}() {{}}\n" for symbol in TARGETS.values())
    name = (
        f'{_EXPORTED} const char* gemma_kernels_instruction_set() {{ return "{instruction_set}"; }}'
    )
    return f"{handlers}{name}\n{more}\n"


def handling_source() -> str:
    """Handlers that XLA can call: each refuses, with its own name as the reason."""
    handlers = "".join(
        f"static xla::ffi::Error Refuse{symbol}(xla::ffi::Result<xla::ffi::AnyBuffer>) {{\n"
        f'  return xla::ffi::Error::InvalidArgument("refused by {symbol}");\n}}\n'
        f"{_EXPORTED} XLA_FFI_Error* {symbol}(XLA_FFI_CallFrame*);\n"
        f"XLA_FFI_DEFINE_HANDLER_SYMBOL({symbol}, Refuse{symbol},\n"
        "                              xla::ffi::Ffi::Bind().Ret<xla::ffi::AnyBuffer>());\n"
        for symbol in TARGETS.values()
    )
    name = f'{_EXPORTED} const char* gemma_kernels_instruction_set() {{ return "avx2"; }}\n'
    return f'#include "xla/ffi/api/ffi.h"\n{handlers}{name}'


def copy_kernels(root: Path, source: str) -> Path:
    """The package `model` under ``root`` with its kernels alone; returns their folder."""
    kernels = root / "model" / "kernels"
    (kernels / "source").mkdir(parents=True)
    for file in DIRECTORY.glob("*.py"):
        shutil.copy(file, kernels)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(DIRECTORY.parent / name, kernels.parent)
    (kernels / "source" / "product.cc").write_text(source)
    return kernels


def python(root: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Python in ``root``, whose ``model`` it runs; without $CXX."""
    kept = {name: value for name, value in os.environ.items() if name != "CXX"}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=root,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
