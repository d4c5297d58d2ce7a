"""Choosing the next token: distribution rules as pure functions, and how one is drawn.

The samplers that Keras users name (`GreedySampler` ... `get`) are imported when they are first
asked for, because they bring Keras; `draw` and `selection`, which the engine uses, need JAX alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.samplers.beam import BeamSampler
    from model.samplers.contrastive import ContrastiveSampler
    from model.samplers.registry import deserialize, get, serialize
    from model.samplers.sampler import Sampler
    from model.samplers.simple import GreedySampler, RandomSampler, TopKSampler, TopPSampler

__all__ = [
    "BeamSampler",
    "ContrastiveSampler",
    "GreedySampler",
    "RandomSampler",
    "Sampler",
    "TopKSampler",
    "TopPSampler",
    "deserialize",
    "get",
    "serialize",
]

_HOME = {
    "BeamSampler": "beam",
    "ContrastiveSampler": "contrastive",
    "GreedySampler": "simple",
    "RandomSampler": "simple",
    "Sampler": "sampler",
    "TopKSampler": "simple",
    "TopPSampler": "simple",
    "deserialize": "registry",
    "get": "registry",
    "serialize": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
