"""Steps of models that can be computed by hand: 26 letters, rows of 12.

A step is what a Keras-named sampler calls, ``(prompt, cache, index)`` to logits, hidden states and
cache. keras-hub tests its samplers with models like these (spec 8.6).
"""

import jax
import jax.numpy as jnp
import numpy as np

LENGTH = 12


def text(row):
    return "".join(chr(97 + token) for token in np.asarray(row).tolist())


def letters(word):
    return jnp.asarray([[ord(letter) - 97 for letter in word]], jnp.int32)


PROMPT = letters("z" * LENGTH)
WORD = letters("sequentially")
STOP_AT_T = [ord("t") - 97]


def favours_a(prompt, cache, index):
    logits = jnp.zeros((prompt.shape[0], 26)).at[:, 0].set(1e9)
    return logits, jnp.ones((prompt.shape[0], 3)), cache


def spells_the_cache(prompt, cache, index):
    column = jax.lax.dynamic_index_in_dim(cache, index, axis=1, keepdims=False)
    hidden = jnp.ones((prompt.shape[0], 3))
    return jax.nn.one_hot(column, 26, dtype=jnp.float32) * 1e9, hidden, cache


def same_logits(logits):
    row = jnp.asarray(logits, jnp.float32)
    return lambda prompt, cache, index: (
        jnp.broadcast_to(row, (prompt.shape[0], row.shape[0])),
        jnp.ones((prompt.shape[0], 3)),
        cache,
    )


DESCENDING = same_logits(jnp.arange(26.0, 0.0, -1.0))
HIDDEN = jnp.ones((1, LENGTH, 3))
SIMPLE = ("greedy", "top_k", "top_p", "random", "beam")
# One for each loop: the other samplers have the loop of greedy.
LOOPS = ("greedy", "beam", "contrastive")
