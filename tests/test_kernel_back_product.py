"""The native way back through a product: its order of summation, and rows that are not real."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels.back_product import back_product
from tests.native_kernels import bits, distance, needs_native_kernels

pytestmark = needs_native_kernels
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
compiled = jax.jit(back_product)


def back(derivative, weight, num_real=None):
    count = derivative.shape[0] if num_real is None else num_real
    return compiled(derivative, weight, jnp.int32(count))


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32).astype(dtype)


@DTYPES
def test_a_way_back_by_hand(instruction_sets, dtype):
    derivative = jnp.array([[1.0, 2.0], [0.0, -1.0]])
    weight = jnp.array([[4.0, 5.0, 6.0], [0.5, -1.0, 2.0]], dtype)
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        assert back(derivative, weight).tolist() == [[5.0, 3.0, 10.0], [-0.5, 1.0, -2.0]]


@pytest.mark.parametrize(
    ("ones", "expected"),
    [
        # 2^24 is where adding one is lost. In the block of row 0 each one is.
        ([1, 2, 255], 2**24),
        # Those of the next block meet each other first.
        ([256, 257], 2**24 + 2),
        ([255, 256], 2**24),
    ],
)
def test_rows_of_the_weight_are_added_in_order_in_blocks_of_256(instruction_sets, ones, expected):
    column = np.zeros((600, 1), np.float32)
    column[0], column[ones] = 2**24, 1
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        assert back(jnp.ones((1, 600)), jnp.asarray(column)).tolist() == [[expected]]


@DTYPES
@pytest.mark.parametrize(("out", "width"), [(1, 1), (300, 96), (513, 131), (40, 640), (257, 1000)])
def test_every_instruction_set_and_company_gives_a_row_the_same_bits(
    instruction_sets, dtype, out, width
):
    derivative, weight = random(70, out), random(out, width, seed=1, dtype=dtype)
    instruction_sets.use("plain")
    plain = back(derivative, weight)
    exact = np.asarray(derivative, np.float64) @ np.asarray(weight.astype(jnp.float32), np.float64)
    assert distance(plain, exact) < 1e-6
    for name in instruction_sets.fast:
        instruction_sets.use(name)
        assert bits(back(derivative, weight)) == bits(plain)
        for rows in (slice(3, 4), slice(5, 12), slice(0, 33)):
            assert bits(back(derivative[rows], weight)) == bits(plain[rows])


def test_rows_that_are_not_real_give_zeros():
    derivative, weight = random(9, 50), random(50, 33, seed=1)
    whole, some = back(derivative, weight), back(derivative, weight, 5)
    assert bits(some[:5]) == bits(whole[:5])
    assert not some[5:].any()
    assert not back(derivative, weight, 0).any()


def test_a_number_of_rows_beyond_them_is_all_of_them():
    derivative, weight = random(3, 20), random(20, 7, seed=1)
    assert bits(back(derivative, weight, 99)) == bits(back(derivative, weight, 3))
