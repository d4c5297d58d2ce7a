"""The real engine with one mistake: a value of a request is Python's, and not an array's.

So each new value is another program. It is what the tests of compilations must find.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from model import engine
from model.dispatch import DeviceDispatch
from model.engine import GemmaEngine
from model.progress import Progress
from model.slots import DecodeRow, EngineOptions


@partial(jax.jit, static_argnums=1)
def _scaled(logit: jax.Array, temperature: float) -> jax.Array:
    return logit * temperature


def load(options: EngineOptions, progress: Progress) -> GemmaEngine:
    """As `model.engine.load`."""
    loaded = engine.load(options, progress)
    decode = loaded.decode

    def decode_and_scale(rows: Sequence[DecodeRow], num_steps: int) -> DeviceDispatch:
        _scaled(jnp.ones(()), rows[0].rules.sampling.temperature)
        return decode(rows, num_steps)

    loaded.decode = decode_and_scale  # type: ignore[method-assign]
    return loaded
