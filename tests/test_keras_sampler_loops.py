"""The loops of the Keras-named samplers, on models that can be computed by hand."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from model import samplers
from model.samplers.contrastive import similarity
from tests.hand_made_models import (
    DESCENDING,
    HIDDEN,
    LENGTH,
    LOOPS,
    PROMPT,
    SIMPLE,
    STOP_AT_T,
    WORD,
    favours_a,
    letters,
    same_logits,
    spells_the_cache,
    text,
)


@pytest.mark.parametrize("identifier", [*SIMPLE, "contrastive"])
def test_columns_before_the_index_stay(identifier):
    result = samplers.get(identifier)(favours_a, PROMPT, index=5, hidden_states=HIDDEN)
    assert text(result[0]) == "zzzzzaaaaaaa"


@pytest.mark.parametrize("identifier", SIMPLE)
def test_the_cache_and_the_index_reach_the_model(identifier):
    result = samplers.get(identifier)(spells_the_cache, PROMPT, cache=WORD)
    assert text(result[0]) == "sequentially"


@pytest.mark.parametrize("identifier", SIMPLE)
def test_a_stop_id_ends_the_loop_and_is_written(identifier):
    sampler = samplers.get(identifier)
    result = sampler(spells_the_cache, PROMPT, cache=WORD, stop_token_ids=STOP_AT_T)
    assert text(result[0]) == "sequentzzzzz"


def test_any_of_several_stop_ids_ends_the_loop():
    stops = letters("tn")[0].tolist()
    result = samplers.GreedySampler()(spells_the_cache, PROMPT, cache=WORD, stop_token_ids=stops)
    assert text(result[0]) == "sequenzzzzzz"


@pytest.mark.parametrize("stop_token_ids", [None, (), []])
def test_without_stop_ids_the_loop_goes_to_the_last_column(stop_token_ids):
    sampler = samplers.GreedySampler()
    result = sampler(spells_the_cache, PROMPT, cache=WORD, stop_token_ids=stop_token_ids)
    assert text(result[0]) == "sequentially"


@pytest.mark.parametrize("identifier", LOOPS)
@pytest.mark.parametrize("mask_dtype", [bool, np.int32])
def test_stop_ids_of_the_prompt_do_not_stop(identifier, mask_dtype):
    prompt = letters("tt" + "z" * (LENGTH - 2))
    mask = (np.arange(LENGTH)[None, :] < 2).astype(mask_dtype)
    arguments = {"index": 2, "mask": mask, "stop_token_ids": STOP_AT_T, "hidden_states": HIDDEN}
    result = samplers.get(identifier)(favours_a, prompt, **arguments)
    assert text(result[0]) == "tt" + "a" * (LENGTH - 2)


@pytest.mark.parametrize("identifier", LOOPS)
def test_the_loop_goes_on_until_every_row_has_stopped_and_keeps_longer_prompts(identifier):
    prompt = jnp.concatenate([PROMPT, letters("ztzb" + "z" * (LENGTH - 4))])
    lengths = np.array([[1], [4]])
    result = samplers.get(identifier)(
        favours_a,
        prompt,
        index=1,
        mask=np.arange(LENGTH)[None, :] < lengths,
        stop_token_ids=[0],
        hidden_states=jnp.ones((2, LENGTH, 3)),
    )
    assert [text(row) for row in result] == ["zaaaazzzzzzz", "ztzbazzzzzzz"]


def test_a_hole_in_the_mask_is_filled():
    mask = np.ones((1, LENGTH), bool)
    mask[0, 4] = False
    assert text(samplers.GreedySampler()(favours_a, PROMPT, index=2, mask=mask)[0]) == (
        "zzzzazzzzzzz"
    )


@pytest.mark.parametrize("identifier", LOOPS)
def test_a_full_prompt_comes_back_as_it_is(identifier):
    sampler = samplers.get(identifier)
    result = sampler(favours_a, PROMPT, index=LENGTH, hidden_states=HIDDEN)
    assert text(result[0]) == "z" * LENGTH


def test_all_beams_come_likeliest_first_with_their_log_probabilities():
    # One column, so that the beams are the tokens in the order of their probability.
    step = same_logits(np.log([0.125, 0.5, 0.25, 0.125]))
    sampler = samplers.BeamSampler(num_beams=3, return_all_beams=True)
    prompts, logprobs = sampler(step, np.zeros((2, 1), np.int32))
    assert prompts[:, :, 0].tolist() == [[1, 2, 0]] * 2
    np.testing.assert_allclose(logprobs, np.log([[0.5, 0.25, 0.125]] * 2), rtol=1e-6)


def test_beams_find_a_sequence_that_greedy_misses():
    # First token: 0.6 or 0.4; after 0 the best second one has 0.5, after 1 it has 1.
    tables = jnp.log(jnp.array([[0.6, 0.4, 0.0], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]]))

    def step(prompt, cache, index):
        before = prompt[:, index - 1]
        state = jnp.where(index == 1, 0, jnp.where(before == 0, 1, 2))
        return tables[state], None, cache

    prompt = np.zeros((1, 3), np.int32)
    assert samplers.GreedySampler()(step, prompt, index=1).tolist() == [[0, 0, 0]]
    sampler = samplers.BeamSampler(num_beams=2, return_all_beams=True)
    prompts, logprobs = sampler(step, prompt, index=1)
    assert prompts.tolist() == [[[0, 1, 2], [0, 0, 0]]]
    np.testing.assert_allclose(np.exp(logprobs), [[0.4, 0.3]], rtol=1e-6)


def test_each_beam_of_a_ragged_batch_is_as_if_it_were_alone():
    # Each token's successors have random odds.
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(26, 26)), jnp.float32)

    def successors(prompt, cache, index):
        return logits[prompt[:, index - 1]], None, cache

    @jax.jit
    def search(prompt, mask):
        sampler = samplers.BeamSampler(num_beams=3, return_all_beams=True)
        return sampler(successors, prompt, index=mask.sum(axis=1).min(), mask=mask)

    prompt = jnp.concatenate([letters("a" * LENGTH), letters("keras" + "z" * (LENGTH - 5))])
    mask = jnp.arange(LENGTH)[None, :] < jnp.array([[1], [5]])
    together, logprobs = search(prompt, mask)
    for row in range(2):
        alone, own = search(prompt[row : row + 1], mask[row : row + 1])
        assert together[row].tolist() == alone[0].tolist()
        assert len(set(map(tuple, alone[0].tolist()))) == 3
        np.testing.assert_allclose(logprobs[row], own[0], rtol=1e-6)


def test_similarity_looks_only_at_columns_before_the_index():
    context = jnp.array([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]])
    candidates = jnp.array([[[5.0, 0.0], [0.0, -1.0], [3.0, 4.0], [-1.0, 0.0]]])
    expected = {0: [-1, -1, -1, -1], 1: [1, 0, 0.6, -1], 2: [1, 0, 0.8, 0], 3: [1, 0, 0.8, 1]}
    for index, values in expected.items():
        result = similarity(candidates, context, jnp.int32(index))
        np.testing.assert_allclose(result, [values], atol=1e-6)


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, "h"), (0.2, "h"), (1.0, "a")])
def test_alpha_weighs_repetition_against_probability(alpha, expected):
    # h is the likeliest but leaves the hidden state of the prompt; a leaves its opposite.
    h = ord("h") - 97
    likes_h = jnp.zeros(26).at[h].set(8.0).at[0].set(2.0)

    def step(prompt, cache, index):
        is_a = prompt[:, index - 1] == 0
        hidden = jnp.where(is_a[:, None], -1.0, 1.0) * jnp.ones((1, 3))
        return jnp.broadcast_to(likes_h, (prompt.shape[0], 26)), hidden, cache

    sampler = samplers.ContrastiveSampler(k=5, alpha=alpha)
    result = sampler(step, PROMPT, index=LENGTH - 1, hidden_states=HIDDEN)
    assert text(result[0]) == "z" * (LENGTH - 1) + expected


def test_contrastive_search_without_hidden_states_says_so():
    with pytest.raises(ValueError, match="needs hidden_states"):
        samplers.ContrastiveSampler()(favours_a, PROMPT)


# A sampler of one's own, and state.


class SecondBest(samplers.Sampler):
    def get_next_token(self, probabilities):
        return jnp.argsort(probabilities, axis=-1)[:, -2]


class Scattered(samplers.Sampler):
    """Holds Keras state of its own."""

    def __init__(self, temperature=1.0):
        super().__init__(temperature)
        self.seeds = keras.random.SeedGenerator(9)
        self.num_steps = keras.Variable(0, dtype="int32", trainable=False)

    def get_next_token(self, probabilities):
        self.num_steps.assign(self.num_steps.value + 1)
        return keras.random.categorical(jnp.log(probabilities), 1, seed=self.seeds)[:, 0]


def test_a_subclass_only_chooses_the_token():
    result = SecondBest()(DESCENDING, PROMPT, index=3)
    assert text(result[0]) == "zzzbbbbbbbbb"


def test_variables_of_a_subclass_take_part_in_the_loop():
    sampler = Scattered()
    as_random = samplers.RandomSampler(seed=9)
    assert sampler(DESCENDING, PROMPT).tolist() == as_random(DESCENDING, PROMPT).tolist()
    assert int(sampler.num_steps.value) == LENGTH
    assert np.asarray(sampler.seeds.state).tolist() == [9, LENGTH]


def test_a_stateless_call_changes_nothing_and_returns_the_state():
    sampler = samplers.TopKSampler(seed=4)
    state = [variable.value for variable in sampler.variables]
    call = jax.jit(lambda state: sampler.stateless_call(state, DESCENDING, PROMPT))
    result, after = call(state)
    assert np.asarray(sampler.variables[0]).tolist() == [4, 0]
    assert [np.asarray(value).tolist() for value in after] == [[4, LENGTH]]
    assert result.tolist() == sampler(DESCENDING, PROMPT).tolist()


def test_state_that_jit_would_lose_is_an_error():
    sampler = samplers.TopKSampler(seed=4)
    with pytest.raises(RuntimeError, match="stateless_call"):
        jax.jit(lambda prompt: sampler(DESCENDING, prompt))(PROMPT)
    assert np.asarray(sampler.variables[0]).tolist() == [4, 0]
    jax.jit(lambda prompt: samplers.GreedySampler()(DESCENDING, prompt))(PROMPT)


def test_a_sampler_without_a_rule_says_what_to_override():
    with pytest.raises(NotImplementedError, match="get_next_token"):
        samplers.Sampler()(DESCENDING, PROMPT)
