"""Gemma once more, in float64 and with nothing but JAX: what losses and gradients should be.

Call it under ``jax.enable_x64(True)``. Adapters are those of files, in their own layout; a row is
padded on the right, where nobody before it looks.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model.config import GemmaConfig


def mean_loss(config, weights, rows, form, pairs):
    """Over the trained tokens of all rows, as a function of the pairs of an adapter."""
    ids, is_trained = (
        np.zeros((len(rows), max(len(row.token_ids) for row in rows)), np.int32) for _ in range(2)
    )
    for number, row in enumerate(rows):
        ids[number, : len(row.token_ids)] = row.token_ids
        is_trained[number, : len(row.token_ids)] = row.is_trained
    wide = jax.tree.map(lambda each: jnp.asarray(np.asarray(each), jnp.float64), weights)
    x = wide.embeddings[ids] * jnp.float64(np.sqrt(np.float32(config.hidden_dim)))
    for layer, block in enumerate(wide.blocks):
        window = config.sliding_window_tokens if config.is_local(layer) else 10**9
        theta = 10_000.0 if config.is_local(layer) else config.global_rope_theta
        scale = 1.0 if config.is_local(layer) else config.global_rope_scale
        own = {target: _by_head(form, target, *pairs[layer, target]) for target in form.targets}
        x = _block(config, block, jnp.float64(theta), jnp.float64(scale), window, own, x)
    return _loss(config, wide, x, jnp.asarray(ids), jnp.asarray(is_trained, jnp.float64))


@partial(jax.jit, static_argnums=0)
def _loss(config, weights, x, ids, is_trained):
    hidden = _norm(x[:, :-1], weights.final_norm, config.final_norm_epsilon)
    logits = _cap(hidden @ weights.embeddings.T, config.final_soft_cap)
    logprobs = jax.nn.log_softmax(logits)
    of_tokens = jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=2)[..., 0]
    return -jnp.sum(of_tokens * is_trained[:, 1:]) / jnp.sum(is_trained)


def _by_head(form, target, a, b):
    """A [heads, in, rank] and B [heads, rank, out]; one head if the heads share both."""
    a, b = jnp.asarray(a, jnp.float64), jnp.asarray(b, jnp.float64)
    if form.layout == "peft":
        return a.T[None], b.T[None] * (form.alpha / form.rank)
    if target in ("query", "key", "value"):
        return a, jnp.tile(b, (len(a), 1, 1))
    return a.reshape(1, -1, form.rank), b[None]


@partial(jax.jit, static_argnums=0)
def _block(config: GemmaConfig, weights, theta, scale, window, pairs, x):
    heads, groups = config.num_query_heads, config.num_key_value_heads

    def product(field, x):
        made = x @ getattr(weights, field).T
        if field not in pairs:
            return made
        a, b = pairs[field]
        low = jnp.einsum("bli,hir->blhr", x, a)
        return made + jnp.einsum("blhr,hro->blho", low, b).reshape(made.shape)

    inner = _norm(x, weights.pre_attention_norm, config.norm_epsilon)
    query, key, value = (
        product(field, inner).reshape(*x.shape[:2], -1, config.head_dim)
        for field in ("query", "key", "value")
    )
    if config.use_query_key_norm:
        query = _norm(query, weights.query_norm, config.norm_epsilon)
        key = _norm(key, weights.key_norm, config.norm_epsilon)
    query, key = (_turned(each, theta, scale) for each in (query, key))
    key, value = (jnp.repeat(each, heads // groups, axis=2) for each in (key, value))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * config.query_scale, key)
    places = jnp.arange(x.shape[1])
    distance = places[:, None] - places[None]
    is_seen = (distance >= 0) & (distance < window)
    logits = jnp.where(is_seen, _cap(logits, config.attention_soft_cap), -jnp.inf)
    seen = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
    attended = product("attention_output", seen.reshape(*x.shape[:2], -1))
    if config.use_post_attention_norm:
        attended = _norm(attended, weights.post_attention_norm, config.norm_epsilon)
    x = x + attended
    inner = _norm(x, weights.pre_ffw_norm, config.norm_epsilon)
    gate, up = product("ffw_gating", inner), product("ffw_gating_2", inner)
    gelu = 0.5 * gate * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    fed = product("ffw_linear", gelu * up)
    if config.use_post_ffw_norm:
        fed = _norm(fed, weights.post_ffw_norm, config.norm_epsilon)
    return x + fed


def _norm(x, scale, epsilon):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * (1 + scale)


def _cap(logits, cap):
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _turned(x, theta, scale):
    """Angles are float32 by definition (Gemma's are, whatever the rest is in)."""
    half = x.shape[-1] // 2
    powers = (-jnp.arange(half, dtype=jnp.float64) / half).astype(jnp.float32)
    frequencies = jnp.power(theta.astype(jnp.float32), powers) / scale.astype(jnp.float32)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    sin, cos = (jnp.asarray(each(angles), jnp.float64) for each in (jnp.sin, jnp.cos))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
