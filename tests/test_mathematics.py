"""The pieces of the model, by hand or by another road."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import Family, GemmaConfig
from model.errors import PresetFileInvalid
from model.gemma import kv_cache, masks
from model.gemma.attention import attend, attend_slot, soft_cap
from model.gemma.backbone import Backbone
from model.gemma.forward import forward
from model.gemma.norms import rms_norm
from model.gemma.projection import AdapterTerm, projection
from model.gemma.rope import apply_rope, inverse_frequencies
from model.slot_memory import num_cache_positions
from model.weight_names import num_parameters
from tests import goldens

compiled_forward = jax.jit(forward, static_argnums=0)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_rms_norm_by_hand():
    # mean(3², 4²) = 12.5; 3 / √12.5 = 0.8485, 4 / √12.5 = 1.1314; scales 1 + 0 and 1 + 1
    normalized = rms_norm(jnp.array([[3.0, 4.0]]), jnp.array([0.0, 1.0]), epsilon=0.0)
    np.testing.assert_allclose(normalized, [[0.84852815, 2.2627417]], rtol=1e-6)


def test_rope_turns_a_pair_by_position_times_frequency():
    # One pair, one radian per position: (1, 0) becomes (cos p, sin p).
    x = jnp.array([[[[1.0, 0.0]], [[1.0, 0.0]]]])
    turned = apply_rope(x, jnp.array([[0, 2]]), jnp.array([1.0]))
    np.testing.assert_allclose(turned[0, :, 0], [[1.0, 0.0], [np.cos(2.0), np.sin(2.0)]], atol=1e-6)


def test_rope_score_depends_only_on_distance():
    frequencies = inverse_frequencies(8, theta=10_000.0)
    query, key = random(1, 1, 1, 8), random(1, 1, 1, 8, seed=1)

    def score(m, n):
        return float(
            jnp.vdot(
                apply_rope(query, jnp.array([[m]]), frequencies),
                apply_rope(key, jnp.array([[n]]), frequencies),
            )
        )

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)


def test_inverse_frequencies_by_hand():
    np.testing.assert_allclose(
        inverse_frequencies(4, theta=100.0, scale=8.0), [1 / 8, 1 / 80], rtol=1e-6
    )


def test_a_window_of_two_shows_a_token_itself_and_the_one_before():
    seen = masks.visible(jnp.arange(4), jnp.arange(4), 2)
    assert seen.astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_padding_hides_keys_and_not_queries():
    mask = jnp.array([[False, True, True]])
    seen = masks.visible_unpadded(jnp.arange(3)[None], mask, masks.UNLIMITED_WINDOW_TOKENS)
    assert seen[0].astype(int).tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_a_query_that_sees_nothing_gets_zeros():
    heads = random(1, 2, 2, 4)
    context = attend(heads, heads, heads, jnp.zeros((1, 2, 2), bool), logit_cap=None)
    assert context.tolist() == np.zeros((1, 2, 2, 4)).tolist()


def test_attention_by_hand():
    # Logits ln 3 and 0: weights 3/4 and 1/4.
    query = jnp.array([[[[np.log(3.0)]]]], jnp.float32)
    key = jnp.array([[[[1.0]], [[0.0]]]])
    value = jnp.array([[[[4.0]], [[8.0]]]])
    mask = jnp.ones((1, 1, 2), bool)
    np.testing.assert_allclose(attend(query, key, value, mask, logit_cap=None), [[[[5.0]]]])


def test_soft_cap_by_hand():
    np.testing.assert_allclose(soft_cap(jnp.array([50.0]), 50.0), [50 * np.tanh(1.0)], rtol=1e-6)
    assert soft_cap(jnp.array([50.0]), None).tolist() == [50.0]


@pytest.mark.parametrize("window", [1, 3, 255, 256, 257, 512, masks.UNLIMITED_WINDOW_TOKENS])
@pytest.mark.parametrize(("start", "num_queries"), [(0, 1), (0, 9), (255, 1), (256, 5), (700, 1)])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_attention_over_a_slot_equals_attention_over_its_keys(window, start, num_queries, cap):
    num_keys = start + num_queries
    query = random(num_queries, 4, 8)
    keys, values = random(num_keys, 2, 8, seed=1), random(num_keys, 2, 8, seed=2)
    # What is not this sequence's is loud, so that reading it shows.
    cache = kv_cache.LayerCache(jnp.full((3, 2, 768, 8), 1e3), jnp.full((3, 2, 768, 8), 1e3))
    cache = kv_cache.LayerCache(
        cache.keys.at[1, :, :num_keys].set(keys.swapaxes(0, 1)),
        cache.values.at[1, :, :num_keys].set(values.swapaxes(0, 1)),
    )
    positions = jnp.arange(start, num_keys, dtype=jnp.int32)
    over_slot = attend_slot(query, cache, jnp.int32(1), positions, jnp.int32(window), logit_cap=cap)
    mask = masks.visible(positions, jnp.arange(num_keys, dtype=jnp.int32), window)
    expected = attend(query[None], keys[None], values[None], mask[None], logit_cap=cap)[0]
    np.testing.assert_allclose(over_slot, expected, atol=2e-6)


def test_a_ring_holds_its_window_while_a_chunk_is_written():
    config = dataclasses.replace(goldens.backbone("gemma3_tiny").config, sliding_window_tokens=512)
    local, global_ = 0, 5
    assert num_cache_positions(config, local, 4096) == 768
    assert num_cache_positions(config, global_, 4096) == 4096
    assert num_cache_positions(config, local, 100) == 256


def test_a_row_without_a_slot_leaves_no_trace():
    empty = kv_cache.LayerCache(jnp.zeros((2, 1, 256, 4)), jnp.zeros((2, 1, 256, 4)))
    written = kv_cache.write(
        empty,
        jnp.array([2, 1]),
        jnp.array([[7], [3]]),
        jnp.ones((2, 1, 1, 4)),
        jnp.ones((2, 1, 1, 4)),
    )
    assert float(written.keys.sum()) == 4.0
    assert written.values[1, 0, 3].tolist() == [1.0] * 4


def test_a_projection_is_x_times_the_transposed_kernel():
    x, kernel = random(2, 3, 4), random(5, 4, seed=1)
    np.testing.assert_allclose(projection(x, kernel), x @ kernel.T, atol=1e-6)


def test_an_adapter_term_is_a_change_of_the_kernel_for_its_row_only():
    x, kernel = random(2, 3, 4), random(6, 4, seed=1)
    a, b = random(2, 3, 4, 2, seed=2), random(2, 3, 2, 2, seed=3)
    merged = projection(x, kernel, AdapterTerm(a, b))
    for row in range(2):
        change = jnp.einsum("hir,hro->hoi", a[row], b[row]).reshape(6, 4)
        np.testing.assert_allclose(merged[row], x[row] @ (kernel + change).T, atol=1e-5)


ADAPTED = ["query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"]


@pytest.mark.parametrize("target", ADAPTED)
def test_adapters_reach_every_projection_of_a_block(target):
    model = goldens.backbone("gemma3_tiny")
    config, weights = model.config, model.gemma_weights
    token_ids = jnp.arange(20, 28, dtype=jnp.int32)[None]
    mask = jnp.ones(token_ids.shape, bool)
    kernel = getattr(weights.blocks[2], target)
    a = random(1, 1, kernel.shape[1], 2, seed=1)
    b = random(1, 1, 2, kernel.shape[0], seed=2) * 0.1
    adapters = [{} for _ in weights.blocks]
    adapters[2] = {target: AdapterTerm(a, b)}
    adapted = compiled_forward(config, weights, token_ids, mask, adapters=adapters).logits

    merged_block = weights.blocks[2]._replace(**{target: kernel + (a[0, 0] @ b[0, 0]).T})
    blocks = (*weights.blocks[:2], merged_block, *weights.blocks[3:])
    merged = compiled_forward(config, weights._replace(blocks=blocks), token_ids, mask).logits
    np.testing.assert_allclose(adapted, merged, atol=2e-3)
    base = compiled_forward(config, weights, token_ids, mask).logits
    assert float(jnp.abs(adapted - base).max()) > 0.1


def test_gradients_flow_through_the_whole_model():
    model = goldens.backbone("gemma1_tiny")
    token_ids = jnp.arange(20, 26, dtype=jnp.int32)[None]
    mask = jnp.ones(token_ids.shape, bool)

    def total(weights):
        return forward(model.config, weights, token_ids, mask).logits.sum()

    gradients = jax.jit(jax.grad(total))(model.gemma_weights)
    norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(gradients)]
    assert all(np.isfinite(norms))
    assert all(norm > 0 for norm in norms)


BASE = GemmaConfig(
    family=Family.GEMMA3,
    vocabulary_size=64,
    num_layers=4,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=16,
    feed_forward_dim=32,
    head_dim=8,
    use_query_key_norm=True,
    use_post_attention_norm=True,
    use_post_ffw_norm=True,
    attention_soft_cap=5.0,
    final_soft_cap=5.0,
    sliding_window_tokens=3,
    global_layer_period=2,
    global_rope_theta=1e6,
    global_rope_scale=2.0,
    norm_epsilon=1e-6,
    final_norm_epsilon=1e-6,
)
CHANGES = {
    "use_query_key_norm": False,
    "use_post_attention_norm": False,
    "use_post_ffw_norm": False,
    "attention_soft_cap": None,
    "final_soft_cap": None,
    "sliding_window_tokens": 2,
    "global_layer_period": 4,
    "global_rope_theta": 10.0,
    "global_rope_scale": 1.0,
    "norm_epsilon": 1e-2,
    "final_norm_epsilon": 1e-2,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_dim": 8,
    "feed_forward_dim": 16,
    "num_layers": 3,
    "vocabulary_size": 65,
    "query_pre_attention_scalar": 18.0,
}
# What a config says beside the mathematics: which stops are usual, and how long it was trained.
NOT_MATHEMATICS = {"family", "context_tokens"}


def logits_of(config, model):
    tokens = jnp.array([[1, 5, 9, 2, 7, 3, 11, 8]])
    mask = jnp.ones(tokens.shape, bool)
    return compiled_forward(config, model.gemma_weights, tokens, mask).logits


def test_every_field_of_the_config_is_tried():
    names = {field.name for field in dataclasses.fields(GemmaConfig)}
    assert names == CHANGES.keys() | NOT_MATHEMATICS


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_of_the_config_changes_the_logits(field):
    changed = dataclasses.replace(BASE, **{field: CHANGES[field]})
    original = logits_of(BASE, Backbone(BASE, seed=3))
    other = logits_of(changed, Backbone(changed, seed=3))
    same_shape = original.shape == other.shape
    assert not (same_shape and np.allclose(original, other, atol=1e-6))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 10**9),
        ("vocabulary_size", 10**12),
        ("head_dim", 7),
        ("num_key_value_heads", 3),
        ("hidden_dim", 0),
        ("attention_soft_cap", float("nan")),
        ("final_soft_cap", float("inf")),
        ("sliding_window_tokens", -1),
        ("hidden_dim", True),
        ("query_pre_attention_scalar", 0.0),
    ],
)
def test_a_config_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(PresetFileInvalid, match=field):
        dataclasses.replace(BASE, **{field: value})


@pytest.mark.parametrize("name", goldens.TINY_PRESETS)
def test_parameters_are_counted_from_shapes(name):
    model = goldens.backbone(name)
    assert num_parameters(model.config) == goldens.cases(name)["meta"]["param_count"]
    assert model.count_params() == num_parameters(model.config)
