"""Which tokens the Keras-named samplers may choose and how often they do; exact sets and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import samplers
from model.samplers.selection import top_p_mask
from model.samplers.simple import candidates_within, draw_columns, likeliest
from tests.hand_made_models import DESCENDING, HIDDEN, LENGTH, PROMPT, SIMPLE, same_logits, text


def test_of_equal_tokens_greedy_takes_the_lowest_id():
    result = samplers.GreedySampler()(same_logits([0.0, 2.0, 2.0, 1.0]), PROMPT)
    assert result.tolist() == [[1] * LENGTH]


def test_likeliest_is_descending_and_of_equals_the_lower_id_stands_first():
    probabilities, token_ids = likeliest(jnp.array([[0.2, 0.3, 0.3, 0.1, 0.1]]), 4)
    assert token_ids.tolist() == [[1, 2, 0, 3]]
    np.testing.assert_array_equal(probabilities, np.float32([[0.3, 0.3, 0.2, 0.1]]))


@pytest.mark.parametrize(
    ("p", "expected"),
    # Before the columns stand masses of 0, 0.5, 0.75 and 0.875.
    [(0.0, 1), (0.49, 1), (0.5, 2), (0.74, 2), (0.75, 3), (0.88, 4), (1.0, 4)],
)
def test_top_p_keeps_each_column_with_at_most_p_before_it(p, expected):
    candidates = jnp.array([[0.5, 0.25, 0.125, 0.125]])
    assert int((candidates_within(candidates, p) > 0).sum()) == expected


def test_top_p_over_all_columns_keeps_the_engines_set():
    generator = np.random.default_rng(0)
    logits = jnp.asarray(generator.integers(-6, 6, (40, 17)) / 2.0, jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    candidates, token_ids = likeliest(probabilities, 17)
    masks_of = jax.jit(jax.vmap(top_p_mask, (0, 0, None)))
    for p in (0.13, 0.5, 0.871, 1.0):
        masks = masks_of(logits, probabilities, jnp.float32(p))
        kept = candidates_within(candidates, p) > 0
        for row in range(len(logits)):
            expected = np.flatnonzero(np.asarray(masks[row])).tolist()
            assert sorted(np.asarray(token_ids[row])[np.asarray(kept[row])].tolist()) == expected


NUM_DRAWS = 20_000


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (samplers.RandomSampler(seed=1), [0.125, 0.5, 0.25, 0.125]),
        # Twice the logits: squared and normalised.
        (samplers.RandomSampler(seed=1, temperature=0.5), [1 / 22, 16 / 22, 4 / 22, 1 / 22]),
        (samplers.TopKSampler(k=2, seed=1), [0.0, 2 / 3, 1 / 3, 0.0]),
        (samplers.TopPSampler(p=0.6, seed=1), [0.0, 2 / 3, 1 / 3, 0.0]),
        (samplers.TopPSampler(p=0.4, seed=1), [0.0, 1.0, 0.0, 0.0]),
        # Of k = 2 the masses stay 1/2 and 1/4: with 2/3 and 1/3 this p would keep the first only.
        (samplers.TopPSampler(p=0.6, k=2, seed=1), [0.0, 2 / 3, 1 / 3, 0.0]),
        (samplers.TopPSampler(p=1.0, k=3, seed=1), [1 / 7, 4 / 7, 2 / 7, 0.0]),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(sampler, expected):
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.125, 0.5, 0.25, 0.125])), (NUM_DRAWS, 4))
    tokens = np.asarray(sampler.get_next_token(sampler.compute_probabilities(logits)))
    frequencies = np.bincount(tokens, minlength=4) / NUM_DRAWS
    # Four standard deviations of a proportion of 20,000 draws are below 0.015.
    np.testing.assert_allclose(frequencies, expected, atol=0.015)


@pytest.mark.parametrize("identifier", [*SIMPLE, "contrastive"])
def test_a_tiny_temperature_leaves_the_likeliest_token(identifier):
    sampler = samplers.get({"class_name": identifier, "config": {"temperature": 1e-25}})
    result = sampler(DESCENDING, PROMPT, index=1, hidden_states=HIDDEN)
    assert text(result[0]) == "z" + "a" * (LENGTH - 1)


def test_a_seed_repeats_its_tokens_and_its_state_lives_on_over_calls():
    def tokens(sampler):
        return np.asarray(sampler(DESCENDING, PROMPT)).tolist()

    sampler, other = samplers.RandomSampler(seed=5), samplers.RandomSampler(seed=5)
    first, second = tokens(sampler), tokens(sampler)
    assert first != second
    assert [tokens(other), tokens(other)] == [first, second]
    assert np.asarray(sampler.seed_generator.state).tolist() == [5, 2 * LENGTH]


def test_a_draw_is_the_gumbel_maximum_with_the_state_as_the_key():
    probabilities = jnp.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    state = jnp.array([7, 3], jnp.uint32)
    key = jax.random.wrap_key_data(state, impl="threefry2x32")
    noise = jax.random.gumbel(key, (2, 4, 1))[:, :, 0]
    expected = np.argmax(np.asarray(noise + jnp.log(probabilities)), axis=1)
    assert draw_columns(probabilities, state).tolist() == expected.tolist()


def test_without_a_seed_two_samplers_differ_and_the_config_keeps_none():
    first, second = samplers.TopKSampler(), samplers.TopKSampler()
    assert np.asarray(first.variables[0]).tolist() != np.asarray(second.variables[0]).tolist()
    assert first.get_config()["seed"] is None
