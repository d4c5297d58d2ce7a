"""Penalties and biases: by hand, and on an engine among rows that have none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.samplers.penalties import PenaltyRows, adjust
from model.slots import Sampling
from tests.test_engine import (
    GREEDY,
    continue_alone,
    continue_together,
    prefill,
    random_tokens,
)

LOGITS = [2.0, -2.0, 1.0, 0.0, 4.0]
VOCAB = len(LOGITS)


def adjusted(prompt=(), completion=(), biases=(), **penalties):
    factors = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0, **penalties}
    history = np.full(8, VOCAB, np.int32)
    history[: len(prompt) + len(completion)] = [*prompt, *completion]
    bias_ids = np.full(4, VOCAB, np.int32)
    values = np.zeros(4, np.float32)
    for place, (token_id, bias) in enumerate(biases):
        bias_ids[place], values[place] = token_id, bias
    row = PenaltyRows(
        *(jnp.float32(factors[key]) for key in ("repetition", "presence", "frequency")),
        jnp.asarray(bias_ids),
        jnp.asarray(values),
    )
    arguments = (jnp.asarray(LOGITS), row, jnp.asarray(history), jnp.int32(len(prompt)))
    return np.asarray(jax.jit(adjust)(*arguments)).tolist()


def test_off_is_off():
    assert adjusted(prompt=[0, 1], completion=[2, 2]) == LOGITS


def test_repetition_shrinks_positive_logits_and_lowers_negative_ones_of_everything_seen():
    assert adjusted([0, 1], [3, 4], repetition=2.0) == [1.0, -4.0, 1.0, 0.0, 2.0]
    assert adjusted([0], [1], repetition=0.5) == [4.0, -1.0, 1.0, 0.0, 4.0]


def test_presence_and_frequency_count_the_completion_alone():
    assert adjusted([0, 4], [2, 2, 3], presence=0.5) == [2.0, -2.0, 0.5, -0.5, 4.0]
    assert adjusted([0, 4], [2, 2, 3], frequency=0.5) == [2.0, -2.0, 0.0, -0.5, 4.0]
    # Repetition first, then both.
    together = adjusted([0, 4], [2, 2, 4], repetition=2.0, presence=0.25, frequency=0.5)
    assert together == [1.0, -2.0, -0.75, 0.0, 1.25]


def test_a_bias_is_added_after_the_penalties():
    assert adjusted(biases=[(4, -3.0), (0, 1.5)]) == [3.5, -2.0, 1.0, 0.0, 1.0]
    assert adjusted([4], biases=[(4, 1.0)], repetition=2.0) == [2.0, -2.0, 1.0, 0.0, 3.0]


def penalized(engine, sampling, prompt, num_tokens, *, slot=0, company=()):
    """Tokens of one row, and its log-probabilities, beside other rows."""
    prompts = {slot: prompt, **{i: other for i, (other, _) in enumerate(company, start=1)}}
    samplings = {slot: sampling, **{i: other for i, (_, other) in enumerate(company, start=1)}}
    for i, other in prompts.items():
        prefill(engine, i, other)
    return continue_together(engine, prompts, num_tokens, samplings)[0]


@pytest.fixture(scope="module")
def engine(engine_of):
    return engine_of("gemma2_tiny")


def test_a_strong_penalty_lets_no_token_come_twice(engine):
    prompt = random_tokens(30)
    plain, _ = continue_alone(engine, prompt, 24)
    assert len(set(plain)) < 24
    sampling = Sampling(0.0, 0, 1.0, 0, repetition_penalty=10.0, frequency_penalty=2.0)
    tokens, _ = penalized(engine, sampling, prompt, 24)
    assert len(set(tokens)) == 24
    assert not set(tokens) & set(prompt)


def test_what_is_reported_is_the_distribution_before_penalties(engine):
    prompt = random_tokens(30)
    (first, *_), (logprob, *_) = continue_alone(engine, prompt, 1)
    sampling = Sampling(0.0, 0, 1.0, 0, logit_bias=((first, 50.0),))
    assert penalized(engine, sampling, prompt, 1) == ([first], [logprob])


def test_a_bias_forces_and_forbids(engine):
    prompt = random_tokens(30)
    forced, _ = penalized(engine, Sampling(1.0, 0, 1.0, 3, logit_bias=((77, 100.0),)), prompt, 5)
    assert forced == [77] * 5
    plain, _ = continue_alone(engine, prompt, 1)
    forbidden = Sampling(0.0, 0, 1.0, 0, logit_bias=((plain[0], -100.0),))
    assert penalized(engine, forbidden, prompt, 1)[0] != plain


def test_company_and_place_change_no_bit_of_a_penalized_row(engine):
    prompt, other = random_tokens(30), random_tokens(25, seed=4)
    sampling = Sampling(1.5, 20, 0.95, 7, 0.01, 1.3, 0.5, 0.25, ((40, 2.0), (41, -2.0)))
    alone = penalized(engine, sampling, prompt, 8)
    biased = Sampling(1.0, 0, 1.0, 5, logit_bias=((3, 9.0),))
    assert penalized(engine, sampling, prompt, 8, slot=3, company=[(other, GREEDY)]) == alone
    company = [(other, GREEDY), (random_tokens(9, seed=5), biased)]
    assert penalized(engine, sampling, prompt, 8, slot=3, company=company) == alone


def test_neighbours_of_a_penalized_row_keep_their_bits(engine):
    prompt = random_tokens(30)
    alone = continue_alone(engine, prompt, 4, slot=1)
    sampling = Sampling(0.0, 0, 1.0, 0, repetition_penalty=2.0)
    neighbour = random_tokens(12, seed=8)
    prefill(engine, 1, prompt)
    prefill(engine, 2, neighbour)
    together = continue_together(engine, {1: prompt, 2: neighbour}, 4, {1: GREEDY, 2: sampling})
    assert together[0] == alone
