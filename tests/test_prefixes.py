"""Which block of a prompt is which, and which are kept."""

import jax.numpy as jnp

from model.prefix_store import PrefixStore
from service.worker.prefix_keys import PrefixKeys

BLOCK = [()]
FINITE = jnp.bool_(True)


def store_of(num_blocks, *chains):
    """A store for so many blocks, with those of the chains, each written as a word."""
    store = PrefixStore(max_bytes=10 * num_blocks + 9, block_bytes=10)
    for chain in chains:
        keep(store, chain)
    return store


def keys_of(chain):
    return [chain[: end + 1].encode() for end in range(len(chain))]


def keep(store, chain):
    keys = keys_of(chain)
    for end in range(len(keys)):
        if store.wants(keys[end]):
            store.add(keys[: end + 1], BLOCK, FINITE)


def num_found(store, chain):
    return len(store.leading(keys_of(chain)))


def test_the_leading_blocks_are_found_up_to_the_first_that_is_not_there():
    store = store_of(8, "abc", "abd")
    assert [num_found(store, chain) for chain in ("abc", "abde", "ax", "b", "")] == [3, 3, 1, 0, 0]
    assert len(store) == 4


def test_a_store_is_bounded_and_forgets_what_was_not_used_for_longest():
    store = store_of(3, "a", "b", "c")
    num_found(store, "a")
    keep(store, "d")
    assert len(store) == 3
    assert [num_found(store, chain) for chain in "abcd"] == [1, 0, 1, 1]


def test_of_a_chain_that_does_not_fit_the_beginning_is_kept():
    store = store_of(3, "abcde")
    assert num_found(store, "abcde") == 3


def test_a_block_that_turns_out_not_to_be_finite_ends_a_chain_and_is_wanted_again():
    store = store_of(8, "ab")
    store.add(keys_of("abc"), BLOCK, jnp.bool_(False))
    keep(store, "abcd")
    assert not store.wants(b"abc"), "not known before it is looked for"
    assert [num_found(store, "abcd") for _ in range(2)] == [2, 2]
    assert store.wants(b"abc")
    assert len(store) == 3


def test_a_store_without_room_for_a_block_wants_none():
    store = PrefixStore(max_bytes=9, block_bytes=10)
    assert not store.wants(b"a")
    assert store.max_blocks == 0


def test_f_r2_a_key_stands_for_tenant_preset_adapter_and_every_token_so_far():
    keys = PrefixKeys("sha256:preset", block_tokens=2)
    other_preset = PrefixKeys("sha256:other", block_tokens=2)
    other_preset._secret = keys._secret
    base = keys.of("one", None, [1, 2, 3, 4, 5])
    assert keys.of("one", None, [1, 2, 3, 4, 5, 6]) == base
    others = [
        keys.of("two", None, [1, 2, 3, 4, 5]),
        keys.of("one", "sha256:adapter", [1, 2, 3, 4, 5]),
        keys.of("one", None, [2, 1, 3, 4, 5]),
        other_preset.of("one", None, [1, 2, 3, 4, 5]),
        # Another worker, or this one after a restart.
        PrefixKeys("sha256:preset", block_tokens=2).of("one", None, [1, 2, 3, 4, 5]),
    ]
    for other in others:
        assert not set(other) & set(base)
    branched = keys.of("one", None, [1, 2, 3, 9, 5])
    assert (branched[0], branched[1] == base[1]) == (base[0], False)


def test_no_part_of_the_beginning_runs_into_the_next():
    keys = PrefixKeys("x", block_tokens=1)
    assert keys.of("t", None, [1, 2]) != keys.of("t", "x", [1, 2])
    assert keys.of("ab", "c", [1, 2]) != keys.of("a", "bc", [1, 2])


def test_the_last_token_of_a_prompt_is_in_no_block():
    keys = PrefixKeys("x", block_tokens=4)
    assert [len(keys.of("t", None, range(n))) for n in (1, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]
