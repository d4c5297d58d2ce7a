"""The forward pass and the cache against arrays that keras-hub 0.32 wrote.

Float32 on the CPU, 2e-4 absolute for every array, activations reaching 20. Products are written
W · xᵀ and sum in another order than keras-hub's, so 1e-5 is not reached;
the largest differences measured are gemma1_tiny 3e-5, gemma2_tiny 1.2e-4, gemma3_tiny 7e-5.

| arrays | compared with |
|---|---|
| fwd.hidden, fwd.logits, fwd.act.* | `forward` |
| score.logits, .logits_nomask, .logits_half1 | `forward` with an intercept |
| cache.prefill_*, step_*, chunk_* | `block` over slots |
| cache.*_cache | our slots through a converter to Keras' layout |

`score.logits_zero_m1` pins an upstream bug (the value returned at −1 is dropped); here it is used.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.gemma import kv_cache
from model.gemma.block import block, layer_traits
from model.gemma.cached_attention import SlotRows
from model.gemma.forward import EMBEDDING_LAYER, embed, final_hidden, forward, head
from model.gemma.kv_cache import LayerCache
from tests import goldens

TOLERANCE = 2e-4


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), expected, atol=TOLERANCE, rtol=0)


def whole_rows(name, **kwargs):
    model, given = goldens.backbone(name), goldens.arrays(name)
    return forward(
        model.config,
        model.gemma_weights,
        jnp.asarray(given["fwd.token_ids"], jnp.int32),
        jnp.asarray(given["fwd.padding_mask"]).astype(bool),
        **kwargs,
    )


@pytest.mark.parametrize("name", goldens.TINY_PRESETS)
def test_forward_equals_keras_hub_for_full_padded_and_holed_rows(name):
    result = whole_rows(name)
    close(result.hidden, goldens.arrays(name)["fwd.hidden"])
    close(result.logits, goldens.arrays(name)["fwd.logits"])


@pytest.mark.parametrize("name", goldens.TINY_PRESETS)
def test_the_keras_model_returns_the_same_hidden_states(name):
    given = goldens.arrays(name)
    inputs = {"token_ids": given["fwd.token_ids"], "padding_mask": given["fwd.padding_mask"]}
    close(goldens.backbone(name)(inputs), given["fwd.hidden"])


@pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])
def test_the_residual_stream_equals_keras_hub_at_every_layer(name):
    seen = {}

    def keep(x, layer):
        seen[layer] = x
        return x

    whole_rows(name, intercept=keep)
    layers = range(EMBEDDING_LAYER, goldens.backbone(name).config.num_layers)
    assert sorted(seen) == list(layers)
    for layer in layers:
        close(seen[layer], goldens.arrays(name)[f"fwd.act.{layer}"])


@pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])
def test_an_intercept_replaces_the_residual_stream(name):
    halved = whole_rows(name, intercept=lambda x, layer: x * 0.5 if layer == 1 else x)
    close(halved.logits, goldens.arrays(name)["score.logits_half1"])


@pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])
def test_what_an_intercept_returns_for_the_embeddings_is_used(name):
    zeroed = whole_rows(name, intercept=lambda x, layer: x * 0 if layer == -1 else x)
    assert not np.allclose(zeroed.logits, goldens.arrays(name)["score.logits_zero_m1"])


@pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])
def test_without_padding_every_token_is_seen(name):
    model, given = goldens.backbone(name), goldens.arrays(name)
    token_ids = jnp.asarray(given["fwd.token_ids"], jnp.int32)
    everything = jnp.ones(token_ids.shape, bool)
    result = forward(model.config, model.gemma_weights, token_ids, everything)
    close(result.logits, given["score.logits_nomask"])


@partial(jax.jit, static_argnums=0)
def over_slots(name, caches, token_ids, start):
    """Logits, hidden states and caches of consecutive tokens, row b in slot b."""
    model = goldens.backbone(name)
    config, weights = model.config, model.gemma_weights
    token_ids = jnp.asarray(token_ids, jnp.int32)
    batch, seq = token_ids.shape
    positions = jnp.broadcast_to(start + jnp.arange(seq, dtype=jnp.int32), (batch, seq))
    x = embed(weights, token_ids)
    new_caches = []
    for layer, traits in enumerate(layer_traits(config)):
        rows = SlotRows(caches[layer], jnp.arange(batch, dtype=jnp.int32))
        x, cache = block(config, weights.blocks[layer], traits, x, positions, rows=rows)
        new_caches.append(cache)
    return head(config, weights, x), final_hidden(config, weights, x), new_caches


def in_keras_layout(caches: list[LayerCache], length: int) -> np.ndarray:
    """[B, L, 2, S, K, H] with the halves of each rotated key interleaved, as in keras-hub."""
    layers = []
    for cache in caches:
        keys = np.asarray(cache.keys)[:, :, :length].swapaxes(1, 2)  # [B, S, K, H]
        values = np.asarray(cache.values)[:, :, :length].swapaxes(1, 2)
        first, second = np.split(keys, 2, axis=-1)
        interleaved = np.stack([first, second], axis=-1).reshape(keys.shape)
        layers.append(np.stack([interleaved, values], axis=1))
    return np.stack(layers, axis=1)


@pytest.mark.parametrize("name", ["gemma1_tiny", "gemma2_tiny"])
def test_prefill_then_a_step_then_a_chunk_equal_keras_hub(name):
    given = goldens.arrays(name)
    batch, length = given["cache.token_ids"].shape
    empty = kv_cache.allocate(goldens.backbone(name).config, batch, length, jnp.dtype("float32"))

    logits, hidden, prefilled = over_slots(name, empty, given["cache.token_ids"], 0)
    close(logits, given["cache.prefill_logits"])
    close(hidden, given["cache.prefill_hidden"])
    close(in_keras_layout(prefilled, length), given["cache.prefill_cache"])

    logits, hidden, stepped = over_slots(name, prefilled, given["cache.step_tokens"], 7)
    close(logits, given["cache.step_logits"])
    close(hidden, given["cache.step_hidden"])
    close(in_keras_layout(stepped, length), given["cache.step_cache"])

    logits, _, chunked = over_slots(name, prefilled, given["cache.chunk_tokens"], 5)
    close(logits, given["cache.chunk_logits"])
    close(in_keras_layout(chunked, length), given["cache.chunk_cache"])
