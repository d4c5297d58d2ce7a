"""Gemma on Keras 3 and JAX: the model, its files, its tokenizer and its engine.

One alphabet of axes, used everywhere and redefined nowhere:

    B batch   L query length   S cache length   N query heads   K key/value heads
    H head_dim   D width (hidden_dim)   F feed-forward   V vocabulary   R LoRA rank

Words in annotations, letters in einsums and in comments at the end of a line.

Keras picks its backend when it is first imported, so this package picks JAX before anything here
imports Keras.
"""

import os
import sys


def _require_jax_backend() -> None:
    """Makes JAX the backend of a Keras that is not imported yet; refuses any other one.

    Raises:
        ImportError: Keras is already running on another backend, or the environment asks for one.
    """
    keras = sys.modules.get("keras")
    if keras is not None and hasattr(keras, "backend"):
        active = keras.backend.backend()
        if active != "jax":
            raise ImportError(
                f"Keras is already imported with the backend {active!r}; this package needs 'jax'. "
                "Import `model` before `keras`, or set KERAS_BACKEND=jax."
            )
        return
    asked_for = os.environ.get("KERAS_BACKEND", "jax")
    if asked_for != "jax":
        raise ImportError(
            f"KERAS_BACKEND is {asked_for!r}; this package needs 'jax'. Unset it or set it to jax."
        )
    os.environ["KERAS_BACKEND"] = "jax"


_require_jax_backend()
