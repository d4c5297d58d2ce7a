"""Distribution rules and draws: exact sets from tiny cases, and frequencies from many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from model.samplers.draw import draw, invert, uniform
from model.samplers.selection import ordered_bits, top_k_mask, top_p_mask


def kept(mask):
    return np.flatnonzero(np.asarray(mask)).tolist()


def top_p(probabilities, p):
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32))
    return kept(top_p_mask(logits, jnp.exp(logits), jnp.float32(p)))


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        # Before the four tokens, likeliest first, stand masses of 0, 0.5, 0.75 and 0.875.
        (0.01, [1]),
        (0.49, [1]),
        (0.51, [1, 2]),
        (0.74, [1, 2]),
        (0.76, [0, 1, 2]),
        (0.88, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_each_token_whose_likelier_ones_have_at_most_p(p, expected):
    assert top_p([0.125, 0.5, 0.25, 0.125], p) == expected


def test_top_p_keeps_the_token_that_crosses_p_even_exactly():
    assert top_p([0.5, 0.25, 0.25], 0.5) == [0, 1]


@pytest.mark.parametrize(("p", "expected"), [(0.1, [0]), (0.3, [0, 1]), (0.6, [0, 1, 2])])
def test_of_equal_tokens_top_p_keeps_the_lower_ids(p, expected):
    assert top_p([0.25] * 4, p) == expected


@pytest.mark.parametrize(
    ("k", "expected"), [(0, [0, 1, 2, 3]), (1, [2]), (2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_largest_and_of_equals_the_lower_ids(k, expected):
    assert kept(top_k_mask(jnp.array([1.0, 1.0, 3.0, 1.0]), jnp.int32(k))) == expected


FLOATS = st.floats(width=32, allow_nan=False)


@settings(deadline=None)
@given(st.lists(FLOATS, min_size=2, max_size=2))
def test_ordered_bits_compare_as_the_numbers_do(pair):
    first, second = (int(bits) for bits in ordered_bits(jnp.asarray(pair, jnp.float32)))
    left, right = np.asarray(jnp.asarray(pair, jnp.float32) + 0.0)
    assert (first < second) == (left < right)
    assert (first == second) == (left == right)


compiled_top_k_mask, compiled_top_p_mask = jax.jit(top_k_mask), jax.jit(top_p_mask)
# A few values only, so that ties are common.
LOGITS = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=8, max_size=8)


@settings(deadline=None)
@given(LOGITS, st.integers(0, 10))
def test_top_k_equals_a_stable_sort(values, k):
    expected = sorted(np.argsort(-np.asarray(values), kind="stable")[: k or None].tolist())
    mask = compiled_top_k_mask(jnp.asarray(values, jnp.float32), jnp.int32(k))
    assert kept(mask) == expected


@settings(deadline=None)
@given(LOGITS, st.floats(0.03, 0.99))
def test_top_p_equals_a_stable_sort(values, p):
    logits = np.asarray(values, np.float64)
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(logits[order]) / np.exp(logits).sum()
    before = np.cumsum(probabilities) - probabilities
    if np.abs(before - p).min() < 1e-5:
        return  # on the border, where float32 may fall on either side
    weights = jnp.exp(jnp.asarray(values, jnp.float32))
    mask = compiled_top_p_mask(jnp.asarray(values, jnp.float32), weights, jnp.float32(p))
    assert kept(mask) == sorted(order[before <= p].tolist())


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, 1), (0.24, 1), (0.26, 3), (0.74, 3), (0.76, 4), (0.9999999, 4)]
)
def test_inverting_the_cumulative_mass_by_hand(fraction, expected):
    weights = jnp.array([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    assert int(invert(weights, jnp.float32(fraction))) == expected


@pytest.mark.parametrize("vocab", [511, 512, 513, 2000])
def test_a_token_of_no_weight_is_never_drawn_whatever_its_segment(vocab):
    for chosen in (0, vocab // 2, vocab - 1):
        weights = jnp.zeros(vocab).at[chosen].set(1e-20)
        for fraction in (0.0, 0.5, 0.99999994):
            assert int(invert(weights, jnp.float32(fraction))) == chosen


def test_a_uniform_number_depends_on_seed_and_position():
    numbers = {
        float(uniform(jnp.uint32(seed), jnp.int32(position)))
        for seed in (0, 1, 2**32 - 1)
        for position in (0, 1, 4095)
    }
    assert len(numbers) == 9
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(jnp.uint32(5), jnp.int32(7)) == uniform(jnp.uint32(5), jnp.int32(7))


def frequencies(logits, temperature, top_k, top_p, min_p=0.0, num_draws=20_000):
    seeds = jnp.arange(num_draws, dtype=jnp.uint32)
    one = jax.jit(
        jax.vmap(
            lambda seed: draw(
                jnp.asarray(logits, jnp.float32),
                jnp.float32(temperature),
                jnp.int32(top_k),
                jnp.float32(top_p),
                jnp.float32(min_p),
                seed,
                jnp.int32(3),
            )
        )
    )
    return np.bincount(np.asarray(one(seeds)), minlength=len(logits)) / num_draws


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p", "expected"),
    [
        (1.0, 0, 1.0, 0.0, [0.125, 0.5, 0.25, 0.125]),
        # Twice the logits: squared and normalised.
        (0.5, 0, 1.0, 0.0, [1 / 22, 16 / 22, 4 / 22, 1 / 22]),
        (1.0, 2, 1.0, 0.0, [0.0, 2 / 3, 1 / 3, 0.0]),
        (1.0, 0, 0.6, 0.0, [0.0, 2 / 3, 1 / 3, 0.0]),
        # Top-p looks at what top-k left: 2/3, 1/3.
        (1.0, 2, 0.6, 0.0, [0.0, 1.0, 0.0, 0.0]),
        # Shares of the likeliest: 1/4, 1, 1/2, 1/4.
        (1.0, 0, 1.0, 0.4, [0.0, 2 / 3, 1 / 3, 0.0]),
        (1.0, 0, 1.0, 1.0, [0.0, 1.0, 0.0, 0.0]),
        # At temperature 2 the shares are 1/2, 1, 1/√2, 1/2.
        (2.0, 0, 1.0, 0.6, [0.0, 2 / (2 + 2**0.5), 2**0.5 / (2 + 2**0.5), 0.0]),
        # Top-p looks at what min-p left.
        (1.0, 0, 0.6, 0.4, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(
    temperature, top_k, top_p, min_p, expected
):
    logits = np.log([0.125, 0.5, 0.25, 0.125])
    # Four standard deviations of a proportion of 20,000 draws are below 0.015.
    found = frequencies(logits, temperature, top_k, top_p, min_p)
    np.testing.assert_allclose(found, expected, atol=0.015)
