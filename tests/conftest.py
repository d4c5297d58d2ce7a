"""What every test shares: a strict JAX, and the versions in the header."""

import importlib.metadata
import os
import platform

# Before anything imports JAX: tests run on the CPU wherever they run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

import model  # noqa: F401  (picks Keras' backend)

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_report_header(config: pytest.Config) -> str:
    packages = ("jax", "jaxlib", "keras", "numpy", "fastapi", "uvicorn")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"Python {platform.python_version()}, {versions}, backend {jax.default_backend()}"
