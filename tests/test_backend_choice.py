"""Importing `model` makes JAX the backend of Keras, or says why it cannot."""

import os
import subprocess
import sys

import pytest


def run(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_jax_becomes_the_backend_of_a_keras_that_is_imported_later():
    result = run("import model, keras; print(keras.backend.backend())")
    assert result.stdout == "jax\n", result.stderr


def test_importing_the_package_imports_neither_keras_nor_jax():
    result = run("import sys, model; print(sorted({'keras', 'jax'} & set(sys.modules)))")
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize("backend", ["torch", "tensorflow", "numpy"])
def test_another_backend_in_the_environment_is_refused_by_name(backend):
    result = run("import model", KERAS_BACKEND=backend)
    assert f"KERAS_BACKEND is '{backend}'; this package needs 'jax'" in result.stderr
    assert result.returncode == 1


def test_a_keras_that_already_runs_on_another_backend_is_refused_by_name():
    result = run("import keras, model", KERAS_BACKEND="numpy")
    assert "Keras is already imported with the backend 'numpy'" in result.stderr
    assert result.returncode == 1
