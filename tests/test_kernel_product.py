"""The native product: one order of summation, whatever the company, the processor, the threads."""

import hashlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels.product import product
from model.programs import CompilationCounter
from tests.native_kernels import bits, distance, needs_native_kernels

pytestmark = needs_native_kernels
MAX_ROWS = 32  # of a decode step
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
compiled_product = jax.jit(product)


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32).astype(dtype)


def exact(x, weight):
    """In float64, of the numbers that the kernel gets."""
    return np.asarray(x, np.float64) @ np.asarray(weight.astype(jnp.float32), np.float64).T


def places(**values):
    """A vector with a few numbers, by place: ``p3=1.0``."""
    vector = np.zeros((1, 40), np.float32)
    for place, value in values.items():
        vector[0, int(place[1:])] = value
    return jnp.asarray(vector)


@DTYPES
def test_a_product_by_hand(instruction_sets, dtype):
    x = jnp.array([[1.0, 2.0, 3.0], [0.0, -1.0, 0.0]])
    weight = jnp.array([[4.0, 5.0, 6.0], [0.5, -1.0, 2.0]], dtype)
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        assert compiled_product(x, weight).tolist() == [[32.0, 4.5], [-5.0, 1.0]]


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # 2^24 is where adding one is lost. Lane 1 gathers two ones before lane 0 meets them.
        (places(p0=2**24, p1=1, p17=1), 2**24 + 2),
        # The same lane: each is lost.
        (places(p0=2**24, p16=1, p32=1), 2**24),
        # Lanes 1 and 9 are halved into one before they meet lane 0; 8 and 4 meet it each alone.
        (places(p0=2**24, p1=1, p9=1), 2**24 + 2),
        (places(p0=2**24, p8=1, p4=1), 2**24),
    ],
)
def test_the_order_of_a_sum_is_sixteen_lanes_and_halves(instruction_sets, weight, expected):
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        assert compiled_product(jnp.ones((1, 40)), weight).tolist() == [[expected]]


def test_a_product_is_added_without_being_rounded_before(instruction_sets):
    # (1 + 2^-12)² = 1 + 2^-11 + 2^-24, whose last part does not fit beside the first.
    x = places(p0=1, p16=1 + 2**-12)
    weight = places(p0=-(1 + 2**-11), p16=1 + 2**-12)
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        assert compiled_product(x, weight).tolist() == [[2**-24]]


@DTYPES
@pytest.mark.parametrize("in_width", [0, 1, 15, 16, 17, 33, 640])
@pytest.mark.parametrize(("rows", "out_width"), [(1, 1), (2, 25), (3, 7), (5, 49), (32, 50)])
def test_every_instruction_set_gives_the_bits_of_plain_code(
    instruction_sets, dtype, in_width, rows, out_width
):
    x, weight = random(rows, in_width), random(out_width, in_width, seed=1, dtype=dtype)
    instruction_sets.use("plain")
    expected = bits(compiled_product(x, weight))
    for name in instruction_sets.fast:
        instruction_sets.use(name)
        assert bits(compiled_product(x, weight)) == expected


@DTYPES
@pytest.mark.parametrize(("rows", "in_width", "out_width"), [(1, 640, 300), (17, 2048, 65)])
def test_it_is_near_the_exact_product_and_that_of_xla(dtype, rows, in_width, out_width):
    x, weight = random(rows, in_width), random(out_width, in_width, seed=1, dtype=dtype)
    result = compiled_product(x, weight)
    assert distance(result, exact(x, weight)) < 1e-6
    assert distance(result, x @ weight.astype(jnp.float32).T) < 1e-5


@DTYPES
def test_a_row_has_the_same_bits_alone_and_at_every_place_among_up_to_thirty_two(
    instruction_sets, dtype
):
    x, weight = np.asarray(random(MAX_ROWS, 75)), random(53, 75, seed=1, dtype=dtype)
    for name in instruction_sets.fast:
        instruction_sets.use(name)
        alone = np.concatenate([compiled_product(x[i : i + 1], weight) for i in range(MAX_ROWS)])
        for count in range(1, MAX_ROWS + 1):
            for shift in (0, 13):
                rows = (np.arange(count) + shift) % MAX_ROWS
                assert bits(compiled_product(x[rows], weight)) == bits(alone[rows])


@pytest.mark.parametrize("in_width", [5, 33])
def test_what_is_not_finite_stays_in_its_row_and_its_output(instruction_sets, in_width):
    x, weight = np.array(random(4, in_width)), np.array(random(9, in_width, seed=1))
    clean = np.asarray(compiled_product(x, weight))
    x[1, -1], x[2, 0], weight[7, -1] = np.nan, -np.inf, np.inf
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        result = np.asarray(compiled_product(x, weight))
        others = np.delete(np.arange(9), 7)
        assert bits(result[[0, 3]][:, others]) == bits(clean[[0, 3]][:, others])
        assert np.isnan(result[1]).all()
        assert not np.isfinite(result[2]).any()
        assert np.isinf(result[[0, 3], 7]).all()


@pytest.mark.parametrize(("rows", "in_width", "out_width"), [(0, 3, 4), (2, 3, 0), (0, 0, 0)])
def test_no_rows_or_no_outputs_are_an_empty_result(rows, in_width, out_width):
    result = compiled_product(jnp.ones((rows, in_width)), jnp.ones((out_width, in_width)))
    assert (result.shape, result.dtype) == ((rows, out_width), jnp.float32)


def test_a_product_over_nothing_is_zero(instruction_sets):
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        result = compiled_product(jnp.ones((2, 0)), jnp.ones((3, 0)))
        assert bits(result) == [0] * 6


def test_numbers_below_the_normal_ones_are_the_same_from_every_thread():
    """1e-20 · 1e-20 is one: shared out among threads, and in a matrix too small for that."""
    x = jnp.full((3, 1), 1e-20)
    few, many = (compiled_product(x, jnp.full((out, 1), 1e-20)) for out in (1, 2**20))
    assert set(bits(many)) == set(bits(few))


@DTYPES
def test_gradients_are_those_of_xla(dtype):
    x, weight, scale = random(5, 33), random(7, 33, seed=1, dtype=dtype), random(5, 7, seed=2)

    def loss(multiply, x, weight):
        return jnp.sum(multiply(x, weight) * scale)

    def portable(x, weight):
        return x @ weight.astype(jnp.float32).T

    ours, theirs = (jax.grad(loss, argnums=(1, 2))(f, x, weight) for f in (product, portable))
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == expected.dtype
        # Two roundings of bfloat16 may fall apart by one of its places.
        tolerance = 1e-6 if mine.dtype == jnp.float32 else 4e-3
        assert distance(mine.astype(jnp.float32), expected.astype(jnp.float32)) < tolerance


def test_a_program_with_it_is_one_program_that_calls_it_once():
    counter = CompilationCounter()
    program = jax.jit(lambda x, weight: jnp.tanh(product(x * 2, weight)) + 1)
    x, weight = random(3, 31), random(29, 31, seed=1)
    before = counter.count
    first = program(x, weight)
    assert counter.count == before + 1
    assert bits(program(x, weight)) == bits(first)
    assert counter.count == before + 1
    text = program.lower(x, weight).compile().as_text()
    assert text.count('custom_call_target="gemma_product"') == 1
    assert " dot(" not in text


def test_a_prompt_of_300_rows_has_the_bits_of_its_rows_a_few_at_a_time():
    x, weight = random(300, 75), random(53, 75, seed=1)
    parts = [compiled_product(x[start : start + 20], weight) for start in range(0, 300, 20)]
    assert bits(compiled_product(x, weight)) == bits(np.concatenate(parts))


@pytest.mark.parametrize("num_real", [-1, 0, 1, 5, 11, 12, 13])
def test_rows_behind_the_real_ones_are_zeros_whatever_they_hold(num_real):
    x, weight = np.array(random(12, 33)), random(7, 33, seed=1)
    whole = np.asarray(compiled_product(x, weight))
    real = min(max(num_real, 0), 12)
    x[real:] = np.nan
    result = np.asarray(compiled_product(x, weight, jnp.int32(num_real)))
    assert bits(result[:real]) == bits(whole[:real])
    assert not result[real:].any()


def test_rows_that_are_not_real_have_no_gradient():
    x, weight = random(6, 17), random(5, 17, seed=1)

    def loss(x, weight, num_real):
        return jnp.sum(jnp.sin(product(x, weight, num_real)))

    of_x, of_weight = jax.grad(loss, argnums=(0, 1))(x, weight, jnp.int32(4))
    of_four, of_its_weight = jax.grad(loss, argnums=(0, 1))(x[:4], weight, jnp.int32(4))
    assert not np.asarray(of_x[4:]).any()
    assert distance(of_x[:4], of_four) < 1e-6
    assert distance(of_weight, of_its_weight) < 1e-6


# --- another process: without the annotations of tests, and with other threads -----------------

# What each call says before anything is compiled.
REFUSALS = {
    "x[:, :2], w": "x [rows, in] and weight [out, in] were expected, not (3, 2) and (5, 4).",
    "x[0], w": "x [rows, in] and weight [out, in] were expected, not (4,) and (5, 4).",
    "x, w[None]": "x [rows, in] and weight [out, in] were expected, not (3, 4) and (1, 5, 4).",
    "x, w.astype('float16')": "x must be float32 and weight float32 or bfloat16, "
    "not float32 and float16.",
    "x.astype('bfloat16'), w": "x must be float32 and weight float32 or bfloat16, "
    "not bfloat16 and float32.",
    "x.astype('int32'), w": "x must be float32 and weight float32 or bfloat16, "
    "not int32 and float32.",
}
REFUSED = f"""
import json, jax, jax.numpy as jnp
from model.kernels.product import product
x, w = jnp.ones((3, 4)), jnp.ones((5, 4))
said = []
for operands in {list(REFUSALS)}:
    try:
        said.append(str(jax.eval_shape(product, *eval(operands))))
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""
BYTES = """
import os, sys
os.sched_setaffinity(0, eval(sys.argv[1]))
import hashlib, jax, numpy as np
from model.kernels.library import load_kernels
from model.kernels.product import product
from tests.kernel_attention import compiled_attention
load_kernels("native")
draw = np.random.default_rng(0)
def normal(*shape): return draw.normal(size=shape).astype(np.float32)
y = jax.jit(product)(normal(9, 640), normal(3001, 640))
query, cache = normal(5, 4, 64), (normal(6, 2, 512, 64), normal(6, 2, 512, 64))
integers = [np.array(x, np.int32) for x in ([0, 5, 2, 1, 4], [511, 700, 3, 90, 511], 400)]
z = compiled_attention(query, *cache, *integers, logit_cap=None)
print(*(hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in (y, z)))
"""


def printed(program, *words):
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shapes_and_dtypes_that_do_not_fit_are_named_while_tracing():
    assert json.loads(printed(REFUSED)) == list(REFUSALS.values())


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="one processor, so always one thread",
)
def test_the_bytes_are_those_of_one_thread():
    processors = sorted(os.sched_getaffinity(0))
    one, all_ = (printed(BYTES, repr(set(some))) for some in (processors[:1], processors))
    assert one == all_
    assert len(one.split()) == 2
    assert len(one.split()[0]) == len(hashlib.sha256().hexdigest())
