"""The derivative of a block: the same with products that were kept, made again, or XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.block_gradient import SequenceRows, block_backward, block_forward
from model.gemma.block import block, layer_traits
from tests import goldens
from tests.native_kernels import needs_native_kernels

NUM_REAL, NUM_TOKENS = 11, 16


@pytest.fixture(scope="module", params=goldens.TINY_PRESETS)
def given(request):
    """A block, two sequences in one row with padding behind them, and a derivative."""
    model = goldens.backbone(request.param)
    draw = np.random.default_rng(0)
    x, by_after = (
        jnp.asarray(draw.normal(size=(1, NUM_TOKENS, model.config.hidden_dim)), jnp.float32)
        for _ in range(2)
    )
    positions = jnp.asarray([[*range(6), *range(5), *range(5)]], jnp.int32)
    sequences = jnp.asarray([[0] * 6 + [1] * 5 + [-1] * 5], jnp.int32)
    is_real = (jnp.arange(NUM_TOKENS) < NUM_REAL)[None, :, None]
    rows = SequenceRows(positions, sequences)
    return (
        *(model.config, model.gemma_weights.blocks[0], layer_traits(model.config)[0]),
        *(x, rows, jnp.where(is_real, by_after, 0.0)),
    )


def by_whole_block(config, weights, traits, x, rows, by_after):
    """As JAX differentiates the block itself."""

    def number(before):
        after, _ = block(config, weights, traits, before, rows.positions, sequences=rows.sequences)
        return (after * by_after).sum()

    return jax.grad(number)(x)


@pytest.mark.parametrize("keeps", [False, True], ids=["again", "kept"])
@pytest.mark.parametrize(
    "is_native", [False, pytest.param(True, marks=needs_native_kernels)], ids=["xla", "native"]
)
def test_it_is_what_jax_makes_of_the_block(given, is_native, keeps):
    config, weights, traits, x, rows, by_after = given
    before = (config, weights, traits, x, rows, jnp.int32(NUM_REAL))

    after, kept = block_forward(*before, is_native=is_native, keeps=keeps)
    found = block_backward(*before, kept, by_after, is_native=is_native)

    assert bool(kept) is keeps
    expected = by_whole_block(*given)
    error = np.linalg.norm((found - expected)[:, :NUM_REAL]) / np.linalg.norm(expected)
    assert error < 2e-6
    whole, _ = block(config, weights, traits, x, rows.positions, sequences=rows.sequences)
    np.testing.assert_allclose(after[:, :NUM_REAL], whole[:, :NUM_REAL], rtol=0, atol=2e-5)


@needs_native_kernels
def test_what_was_kept_is_used_and_not_made_again(given):
    config, weights, traits, x, rows, by_after = given
    before = (config, weights, traits, x, rows, jnp.int32(NUM_REAL))
    _, kept = block_forward(*before, is_native=True, keeps=True)

    right = block_backward(*before, kept, by_after, is_native=True)
    wrong = block_backward(
        *before, {**kept, "ffw_gating": 2 * kept["ffw_gating"]}, by_after, is_native=True
    )

    assert not np.allclose(right, wrong)


@needs_native_kernels
def test_padding_is_not_computed(given):
    """Two numbers of real tokens in one padded row: each real one has the same bits."""
    config, weights, traits, x, rows, by_after = given
    few = jnp.int32(6)
    only_first = jnp.where((jnp.arange(NUM_TOKENS) < 6)[None, :, None], by_after, 0.0)
    found = []
    for num_real in (few, jnp.int32(NUM_REAL)):
        before = (config, weights, traits, x, rows, num_real)
        after, kept = block_forward(*before, is_native=True, keeps=True)
        back = block_backward(*before, kept, only_first, is_native=True)
        found.append((np.asarray(after[:, :6]).tobytes(), np.asarray(back[:, :6]).tobytes()))
        assert not np.asarray(kept["query"][0, int(num_real) :]).any()
    assert found[0] == found[1]
