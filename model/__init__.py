"""Gemma on Keras 3 and JAX: the model, its files, its tokenizer and its engine.

One alphabet of axes, used everywhere and redefined nowhere:

    B batch   L query length   S cache length   N query heads   K key/value heads
    H head_dim   D width (hidden_dim)   F feed-forward   V vocabulary   R LoRA rank

Words in annotations, letters in einsums and in comments at the end of a line.

The Keras interface is `from model import GemmaCausalLM, CausalLM, GemmaBackbone, Gemma3Backbone,
GemmaTokenizer, GemmaCausalLMPreprocessor, samplers`; each is imported when it is first asked for.

Keras picks its backend when it is first imported, so this package picks JAX before anything here
imports Keras.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model import samplers
    from model.causal_lm import CausalLM, GemmaCausalLM
    from model.keras_backbone import Gemma3Backbone, GemmaBackbone
    from model.keras_tokenizer import GemmaTokenizer
    from model.preprocessor import GemmaCausalLMPreprocessor

__all__ = [
    "CausalLM",
    "Gemma3Backbone",
    "GemmaBackbone",
    "GemmaCausalLM",
    "GemmaCausalLMPreprocessor",
    "GemmaTokenizer",
    "samplers",
]

_HOME = {
    "CausalLM": "causal_lm",
    "Gemma3Backbone": "keras_backbone",
    "GemmaBackbone": "keras_backbone",
    "GemmaCausalLM": "causal_lm",
    "GemmaCausalLMPreprocessor": "preprocessor",
    "GemmaTokenizer": "keras_tokenizer",
}


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


def __getattr__(name: str) -> Any:
    if name == "samplers":
        return importlib.import_module("model.samplers")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
