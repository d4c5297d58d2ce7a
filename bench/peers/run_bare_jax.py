"""A bare loop over plain JAX: ``run_bare_jax.py DIRECTORY``, with safetensors; see `answering`.

The simplest greedy decoder that is fast: one jitted function of weights, cache, tokens and a
position, with the cache donated, called in a Python loop. It shares nothing with the engine of the
project and promises nothing beyond tokens: rows have one length, every shape is compiled when it
first comes, and bits depend on the shape.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from answering import serve
from safetensors.numpy import load_file


def read_model(directory):
    """Config and weights, kernels turned to [in, out], which is faster for this CPU's products."""
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    layers = []
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        layers.append(
            {
                name.removeprefix(prefix).removesuffix(".weight").split(".")[-1]: jnp.asarray(
                    np.ascontiguousarray(array.T)
                )
                for name, array in tensors.items()
                if name.startswith(prefix)
            }
        )
    return config, {
        "embedding": jnp.asarray(tensors["model.embed_tokens.weight"]),
        "norm": jnp.asarray(tensors["model.norm.weight"]),
        "layers": layers,
    }


def norm(x, scale, epsilon=1e-6):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon) * (1 + scale)


def rotate(x, positions, theta):
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-jnp.arange(half) / half)  # [L, H/2]
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attention(config, weights, x, cache, start, is_local):
    """The attention's output, and the cache with the keys and values of ``x``."""
    batch, length, _ = x.shape
    head_dim, groups = config["head_dim"], config["num_key_value_heads"]
    theta = config["rope_local_base_freq" if is_local else "rope_theta"]
    positions = start + jnp.arange(length)
    query, key, value = (
        (x @ weights[name]).reshape(batch, length, -1, head_dim)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    query = rotate(norm(query, weights["q_norm"]), positions, theta)
    key = rotate(norm(key, weights["k_norm"]), positions, theta)
    keys = jax.lax.dynamic_update_slice(cache[0], key, (0, start, 0, 0))
    values = jax.lax.dynamic_update_slice(cache[1], value, (0, start, 0, 0))
    distance = positions[:, None] - jnp.arange(keys.shape[1])  # [L, S]
    visible = (distance >= 0) & (distance < (config["sliding_window"] if is_local else 1 << 30))
    query = query.reshape(batch, length, groups, -1, head_dim)
    query = query * config["query_pre_attn_scalar"] ** -0.5
    logits = jnp.einsum("blkgh,bskh->bkgls", query, keys)
    weighted = jax.nn.softmax(jnp.where(visible, logits, -1e30), -1)
    context = jnp.einsum("bkgls,bskh->blkgh", weighted, values)
    return context.reshape(batch, length, -1) @ weights["o_proj"], (keys, values)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def step(config_json, weights, caches, token_ids, start):
    """The likeliest next token of each row, [B, 1], and the caches."""
    config = json.loads(config_json)
    x = weights["embedding"][token_ids] * config["hidden_size"] ** 0.5
    written = []
    for layer, cache, kind in zip(weights["layers"], caches, config["layer_types"], strict=True):
        is_local = kind == "sliding_attention"
        attended, cache = attention(
            config, layer, norm(x, layer["input_layernorm"]), cache, start, is_local
        )
        written.append(cache)
        x = x + norm(attended, layer["post_attention_layernorm"])
        inner = norm(x, layer["pre_feedforward_layernorm"])
        gated = jax.nn.gelu(inner @ layer["gate_proj"]) * (inner @ layer["up_proj"])
        x = x + norm(gated @ layer["down_proj"], layer["post_feedforward_layernorm"])
    logits = norm(x[:, -1:], weights["norm"]) @ weights["embedding"].T
    return jnp.argmax(logits, -1), written


def main(directory):
    config, weights = read_model(Path(directory))
    config_json = json.dumps(config)

    def generate(prompts, num_new_tokens):
        token_ids = jnp.asarray(prompts)
        batch, length = token_ids.shape
        shape = (batch, length + num_new_tokens, config["num_key_value_heads"], config["head_dim"])
        caches = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config["num_hidden_layers"])]
        newest, caches = step(config_json, weights, caches, token_ids, 0)
        new = [newest]
        for position in range(length, length + num_new_tokens - 1):
            newest, caches = step(config_json, weights, caches, newest, position)
            new.append(newest)
        return np.concatenate(new, 1).tolist()

    serve(generate, ("jax",))


if __name__ == "__main__":
    main(sys.argv[1])
