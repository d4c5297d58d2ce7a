"""Attention of the native block against the portable one, float64, and itself in other company."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.gemma.attention import attend_slot
from model.gemma.kv_cache import LayerCache
from model.gemma.masks import UNLIMITED_WINDOW_TOKENS
from tests.kernel_attention import compiled_attention
from tests.native_kernels import bits, distance, needs_native_kernels

pytestmark = needs_native_kernels
portable = jax.jit(attend_slot, static_argnames="logit_cap")


class Case(NamedTuple):
    """What one call gets; NumPy arrays, so that tests can spoil parts of them."""

    query: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    slots: np.ndarray
    positions: np.ndarray
    window: int = UNLIMITED_WINDOW_TOKENS

    def attended(self, *, logit_cap=None):
        result = compiled_attention(*self[:5], np.int32(self.window), logit_cap=logit_cap)
        return np.asarray(result)

    def rows(self, indices):
        return self._replace(
            query=self.query[indices],
            slots=self.slots[indices],
            positions=self.positions[indices],
        )


def case(positions, *, heads=4, kv_heads=2, head_dim=8, cache=256, window=UNLIMITED_WINDOW_TOKENS):
    """A row for each position, in a slot of its own, in another order, beside an empty slot."""
    draw = np.random.default_rng(5)
    num_rows = len(positions)

    def normal(*shape):
        return draw.normal(size=shape).astype(np.float32)

    keys, values = (normal(num_rows + 1, kv_heads, cache, head_dim) for _ in range(2))
    slots = np.roll(np.arange(num_rows), 1).astype(np.int32)
    query = normal(num_rows, heads, head_dim)
    return Case(query, keys, values, slots, np.array(positions, np.int32), window)


def exactly(case, row, *, logit_cap=None):
    """In float64, written out: each key that the token sees, by its place in the ring."""
    keys, values = (x[case.slots[row]].astype(np.float64) for x in (case.keys, case.values))
    position, num_places = int(case.positions[row]), keys.shape[1]
    first = max(0, position - case.window + 1, position - num_places + 1)
    places = np.arange(first, position + 1) % num_places
    heads, sharing = case.query.shape[1], case.query.shape[1] // keys.shape[0]
    result = []
    for head in range(heads):
        logits = keys[head // sharing][places] @ case.query[row, head].astype(np.float64)
        if logit_cap is not None:
            logits = np.tanh(logits / logit_cap) * logit_cap
        weights = np.exp(logits - logits.max())
        result.append(weights / weights.sum() @ values[head // sharing][places])
    return np.array(result)


def test_attention_by_hand(instruction_sets):
    # Logits ln 3 and 0: weights 3/4 and 1/4. The second row sees its own token alone.
    query = np.array([[[np.log(3), 0]]] * 2, np.float32)
    keys = np.array([[[[1.0, 0], [0.0, 5], [9.0, 0]]]], np.float32)
    values = np.array([[[[4.0, 1], [8.0, 1], [1.0, 7]]]], np.float32)
    row = np.zeros(2, np.int32)
    by_hand = Case(query, keys, values, row, np.array([1, 0], np.int32))
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        np.testing.assert_allclose(by_hand.attended(), [[[5.0, 1.0]], [[4.0, 1.0]]], rtol=1e-6)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [1, 3, 255, 256, 257, 512, UNLIMITED_WINDOW_TOKENS])
def test_it_is_attention_over_the_slot_of_each_row(window, cap):
    given = case([0, 1, 255, 256, 700], cache=768, window=window)
    attended = given.attended(logit_cap=cap)
    cache = LayerCache(jnp.asarray(given.keys), jnp.asarray(given.values))
    for row, result in enumerate(attended):
        query, at = given.query[row : row + 1], given.positions[row : row + 1]
        slot = given.slots[row]
        expected = portable(query, cache, slot, at, np.int32(window), logit_cap=cap)
        assert distance(result, expected[0]) < 2e-6
        assert distance(result, exactly(given, row, logit_cap=cap)) < 2e-6


@pytest.mark.parametrize("positions", [[511, 512, 513], [700, 1023, 1024], [5000, 2**31 - 1, 0]])
@pytest.mark.parametrize("window", [4, 500, UNLIMITED_WINDOW_TOKENS])
def test_a_ring_holds_a_position_at_itself_modulo_its_length(positions, window):
    given = case(positions, cache=512, window=window)
    for row, result in enumerate(given.attended()):
        assert distance(result, exactly(given, row)) < 2e-6


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "cache"),
    [
        (1, 1, 2, 1),
        (3, 1, 14, 7),
        (4, 4, 16, 256),
        (6, 2, 18, 33),
        (5, 1, 64, 19),
        (32, 1, 34, 40),
        (8, 4, 256, 256),
        (14, 2, 100, 64),
    ],
)
def test_every_instruction_set_gives_the_bits_of_plain_code(
    instruction_sets, heads, kv_heads, head_dim, cache, cap
):
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "cache": cache}
    given = case([0, cache // 2, 3 * cache - 1], window=29, **shape)
    instruction_sets.use("plain")
    expected = given.attended(logit_cap=cap)
    for row, result in enumerate(expected):
        assert distance(result, exactly(given, row, logit_cap=cap)) < 2e-6
    for name in instruction_sets.fast:
        instruction_sets.use(name)
        assert bits(given.attended(logit_cap=cap)) == bits(expected)


def test_a_row_has_the_same_bits_alone_and_at_every_place_among_up_to_thirty_two(instruction_sets):
    """32 rows are shared out among threads; one, and some, are not."""
    given = case(list(range(0, 256, 8)), heads=3, kv_heads=1, head_dim=40)
    for name in instruction_sets.fast:
        instruction_sets.use(name)
        alone = np.concatenate([given.rows([row]).attended() for row in range(32)])
        for count in range(1, 33):
            rows = (np.arange(count) + 13) % 32
            assert bits(given.rows(rows).attended()) == bits(alone[rows])


@pytest.mark.parametrize("slot", [-1, 4, 2**31 - 1, -(2**31)])
def test_a_slot_that_does_not_exist_gives_zeros(instruction_sets, slot):
    given = case([5, 6, 7])
    expected = given.attended()
    given.slots[1] = slot
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        result = given.attended()
        assert bits(result[1]) == [0] * result[1].size
        assert bits(result[[0, 2]]) == bits(expected[[0, 2]])


@pytest.mark.parametrize(("position", "window"), [(-1, 9), (-(2**31), 9), (7, 0), (7, -(2**31))])
def test_a_token_that_sees_nothing_gets_zeros(position, window):
    given = case([position, position], window=window)
    assert bits(given.attended()) == [0] * given.query.size


@pytest.mark.parametrize("spoiled", [np.nan, np.inf, -np.inf])
def test_what_stands_beyond_a_token_before_its_window_and_in_other_slots_changes_no_bit(
    instruction_sets, spoiled
):
    given = case([100, 40, 600], window=20)
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        clean = given.attended()
        seen = np.zeros(given.keys.shape[:3], bool)
        for slot, position in zip(given.slots, given.positions, strict=True):
            seen[slot, :, np.arange(position - 19, position + 1) % 256] = True
        keys, values = (np.where(seen[..., None], x, spoiled) for x in given[1:3])
        assert bits(given._replace(keys=keys, values=values).attended()) == bits(clean)


@pytest.mark.parametrize("field", ["keys", "values"])
@pytest.mark.parametrize("position", [0, 17, 99])
def test_nan_among_the_keys_or_values_of_a_token_reaches_its_result(
    instruction_sets, field, position
):
    given = case([100, 100, 100])
    slot = given.slots[1]
    getattr(given, field)[slot, :, position, 3] = np.nan
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        finite = np.isfinite(given.attended())
        assert finite[[0, 2]].all()
        assert not finite[1].all(axis=-1).any()


def test_weights_are_exponentials_to_a_few_places(instruction_sets):
    """Two keys, of logits 0 and −x: of the second value comes through e^-x / (1 + e^-x)."""
    logits = -np.linspace(0, 86, 200, dtype=np.float32)
    keys = np.zeros((200, 1, 2, 2), np.float32)
    values = np.zeros((200, 1, 2, 2), np.float32)
    keys[:, 0, 1, 0], values[:, 0, 1, 0] = logits, 1
    slots, positions = np.arange(200, dtype=np.int32), np.ones(200, np.int32)
    given = Case(np.ones((200, 1, 2), np.float32), keys, values, slots, positions)
    expected = np.exp(logits.astype(np.float64)) / (1 + np.exp(logits.astype(np.float64)))
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        np.testing.assert_allclose(given.attended()[:, 0, 0], expected, rtol=5e-7)


def test_logits_far_below_the_largest_weigh_nothing_that_shows(instruction_sets):
    """Below −87 the exponential stays where it is, 1e-38: lost beside any other weight."""
    given = case([1])
    given.query[:] = 1
    given.keys[:, :, 0], given.keys[:, :, 1] = 0, -1e4
    for name in ("plain", *instruction_sets.fast):
        instruction_sets.use(name)
        own = given.values[given.slots[0], :, 0].repeat(2, axis=0)
        np.testing.assert_array_equal(given.attended()[0], own)
