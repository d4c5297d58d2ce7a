"""The engine on tiny presets: the same answer by another road."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.engine import load, row_buckets
from model.errors import SequenceTooLong, TokenOutOfRange, UnsupportedPreset
from model.gemma.forward import forward
from model.progress import no_progress
from model.slots import MAX_LOGPROBS, DecodeRow, EngineOptions, Sampling
from tests import goldens

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)
compiled_forward = jax.jit(forward, static_argnums=0)
PRESETS = pytest.mark.parametrize("name", goldens.TINY_PRESETS)


def random_tokens(num_tokens, seed=0):
    return np.random.default_rng(seed).integers(12, 512, num_tokens).tolist()


def prefill(engine, slot, prompt):
    """All but the last token, in chunks."""
    chunk = engine.info.chunk_tokens
    for start in range(0, len(prompt) - 1, chunk):
        engine.prefill(slot, prompt[start : min(start + chunk, len(prompt) - 1)], start)


def continue_alone(engine, prompt, num_tokens, *, slot=0, sampling=GREEDY):
    """Tokens and log-probabilities of one sequence with the engine to itself."""
    prefill(engine, slot, prompt)
    [continued] = continue_together(engine, {slot: prompt}, num_tokens, {slot: sampling})
    return continued


def continue_together(engine, prompts, num_tokens, samplings):
    """Tokens and log-probabilities of prompts that their slots hold already, in that order."""
    tokens = {slot: list(prompt) for slot, prompt in prompts.items()}
    logprobs = {slot: [] for slot in prompts}
    for _ in range(num_tokens):
        rows = [
            DecodeRow(slot, ids[-1], len(ids) - 1, samplings[slot], num_logprobs=0)
            for slot, ids in tokens.items()
        ]
        for row, sampled in zip(rows, engine.decode(rows), strict=True):
            tokens[row.slot].append(sampled.token_id)
            logprobs[row.slot].append(sampled.logprob)
    return [(tokens[slot][len(prompt) :], logprobs[slot]) for slot, prompt in prompts.items()]


def full_logprobs(name, tokens):
    """log p of every token given those before it, from one forward pass."""
    model = goldens.backbone(name)
    # Padded to one length, so that each preset compiles once; what follows a token cannot matter.
    token_ids = np.zeros((1, 768), np.int32)
    token_ids[0, : len(tokens)] = tokens
    mask = np.arange(768)[None] < len(tokens)
    logits = compiled_forward(model.config, model.gemma_weights, token_ids, mask).logits[0]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))[: len(tokens)]


@PRESETS
@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 33, 256, 257, 258, 700])
def test_prefill_and_decode_equal_one_full_forward_pass(name, num_prompt_tokens, engine_of):
    prompt = random_tokens(num_prompt_tokens)
    completion, logprobs = continue_alone(engine_of(name), prompt, 8)
    tokens = prompt + completion
    expected = full_logprobs(name, tokens)[np.arange(len(prompt) - 1, len(tokens) - 1), completion]
    np.testing.assert_allclose(logprobs, expected, atol=2e-4, rtol=0)


def test_decoding_goes_on_where_the_ring_of_a_local_layer_wraps(engine_of):
    # Window 4: a ring of 512 positions, and 500 tokens before the first one decoded.
    prompt = random_tokens(500)
    completion, logprobs = continue_alone(engine_of("gemma3_tiny"), prompt, 40)
    tokens = prompt + completion
    expected = full_logprobs("gemma3_tiny", tokens)[np.arange(499, 539), completion]
    np.testing.assert_allclose(logprobs, expected, atol=2e-4, rtol=0)


@PRESETS
def test_what_a_slot_held_before_changes_no_bit(name, engine_of):
    engine, prompt = engine_of(name), random_tokens(40)
    first = continue_alone(engine, prompt, 6, slot=1)
    continue_alone(engine, random_tokens(600, seed=1), 6, slot=1)
    assert continue_alone(engine, prompt, 6, slot=1) == first
    assert continue_alone(engine, prompt, 6, slot=3) == first


@PRESETS
def test_rows_of_a_batch_answer_as_they_do_alone_to_the_last_bit(name, engine_of):
    engine = engine_of(name)
    # In another order than the slots, which must not matter.
    prompts = {slot: random_tokens(n, seed=n) for slot, n in ((2, 300), (0, 3), (1, 40))}
    samplings = {0: GREEDY, 1: Sampling(1.5, 0, 0.9, 7), 2: Sampling(0.7, 40, 1.0, 8)}
    alone = [
        continue_alone(engine, prompt, 10, sampling=samplings[slot])
        for slot, prompt in prompts.items()
    ]
    for slot, prompt in prompts.items():
        prefill(engine, slot, prompt)
    assert continue_together(engine, prompts, 10, samplings) == alone


# 257 - 1 tokens fill a block and 258 - 1 begin the next; 510 go on into the second round of a ring
# of 512 positions while they are continued, and 700 have begun it before they are copied.
@PRESETS
@pytest.mark.parametrize("num_prompt_tokens", [2, 257, 258, 510, 700])
def test_a_copied_prompt_is_continued_as_a_prefilled_one_to_the_last_bit(
    name, num_prompt_tokens, engine_of
):
    engine, prompt, other = engine_of(name), random_tokens(num_prompt_tokens), random_tokens(600, 1)
    prompts = {3: prompt, 0: prompt, 2: other, 1: prompt}
    samplings = {slot: Sampling(1.5, 0, 0.9, seed=slot) for slot in prompts}
    alone = [
        continue_alone(engine, prompts[slot], 8, slot=slot, sampling=samplings[slot])
        for slot in prompts
    ]
    for slot in (0, 3):
        poison(engine, slot)
    prefill(engine, 2, other)
    prefill(engine, 1, prompt)
    engine.copy(1, [0, 3], num_prompt_tokens - 1)
    assert continue_together(engine, prompts, 8, samplings) == alone


def test_alternatives_are_the_likeliest_tokens_of_the_models_own_distribution(engine_of):
    engine, prompt = engine_of("gemma2_tiny"), random_tokens(20)
    prefill(engine, 0, prompt)
    hot = Sampling(temperature=3.0, top_k=2, top_p=0.5, seed=5)
    (sampled,) = engine.decode([DecodeRow(0, prompt[-1], 19, hot, (), MAX_LOGPROBS)])
    expected = full_logprobs("gemma2_tiny", prompt)[-1]
    best = np.argsort(-expected)[:MAX_LOGPROBS]
    assert [token_id for token_id, _ in sampled.top] == best.tolist()
    np.testing.assert_allclose([value for _, value in sampled.top], expected[best], atol=2e-4)
    assert sampled.logprob == pytest.approx(expected[sampled.token_id], abs=2e-4)


def test_a_draw_depends_on_its_seed(engine_of):
    engine, prompt = engine_of("gemma3_tiny"), random_tokens(10)
    drawn = {
        tuple(continue_alone(engine, prompt, 8, sampling=Sampling(2.0, 0, 1.0, seed))[0])
        for seed in range(6)
    }
    assert len(drawn) == 6
    again = continue_alone(engine, prompt, 8, sampling=Sampling(2.0, 0, 1.0, 3))[0]
    assert tuple(again) in drawn


def test_a_vanishing_temperature_is_greedy(engine_of):
    engine, prompt = engine_of("gemma3_tiny"), random_tokens(10)
    greedy = continue_alone(engine, prompt, 5)
    for temperature in (5e-324, 1e-40, 1e-20, 1e-6):
        cold = Sampling(temperature, 0, 0.99, 4)
        assert continue_alone(engine, prompt, 5, sampling=cold) == greedy


def test_banned_ids_are_never_drawn(engine_of):
    engine, prompt = engine_of("gemma3_tiny"), random_tokens(10)
    prefill(engine, 0, prompt)
    banned = ()
    for _ in range(6):
        (sampled,) = engine.decode([DecodeRow(0, prompt[-1], 9, GREEDY, banned)])
        assert sampled.token_id not in banned
        banned = (*banned, sampled.token_id)


def test_nothing_compiles_once_an_engine_is_loaded(engine_of):
    engine = engine_of("gemma3_tiny")
    before = engine.num_compilations
    assert before > 0
    for num_tokens in (1, 5, 40, 100, 200, 256, 257, 600):
        continue_alone(engine, random_tokens(num_tokens), 2, sampling=Sampling(1.0, 5, 0.5, 1))
        engine.copy(0, [1, 2], num_tokens)
    for num_rows in (1, 2, 3, 4):
        rows = [
            DecodeRow(slot, 20 + slot, slot, Sampling(0.1 * slot, slot, 1 - 0.2 * slot, slot),
                      tuple(range(slot)), slot or None)
            for slot in range(num_rows)
        ]  # fmt: skip
        engine.decode(rows)
    assert engine.num_compilations == before


def test_the_compilation_counter_sees_a_new_program(engine_of):
    engine = engine_of("gemma3_tiny")
    before = engine.num_compilations
    jax.jit(lambda x: x * 3 + 17)(jnp.arange(91))
    assert engine.num_compilations > before


def test_a_context_beyond_the_trained_one_is_refused_with_both_numbers(cache_dir):
    preset = str(goldens.preset_directory("gemma1_tiny"))
    with pytest.raises(UnsupportedPreset, match="8193 tokens is more than the 8192"):
        load(EngineOptions(preset, 2, 8193, cache_dir), no_progress)


@pytest.mark.parametrize("token_id", [-1, 512, 2**31])
def test_a_token_outside_the_vocabulary_never_reaches_jax(token_id, engine_of):
    engine = engine_of("gemma1_tiny")
    with pytest.raises(TokenOutOfRange, match=rf"{token_id} is not in \[0, 512\)"):
        engine.prefill(0, [5, token_id], 0)
    with pytest.raises(TokenOutOfRange):
        engine.decode([DecodeRow(0, token_id, 0, GREEDY)])


@pytest.mark.parametrize(("start", "num_tokens"), [(1, 5), (1024, 1), (768, 257)])
def test_a_chunk_outside_its_slot_is_refused(start, num_tokens, engine_of):
    with pytest.raises(SequenceTooLong):
        engine_of("gemma1_tiny").prefill(0, [5] * num_tokens, start)


def poison(engine, slot):
    """Fills one slot of every layer with NaN."""
    engine._caches = [
        type(cache)(cache.keys.at[slot].set(jnp.nan), cache.values.at[slot].set(jnp.nan))
        for cache in engine._caches
    ]


def test_a_poisoned_slot_is_noticed_and_changes_no_other_row(engine_of):
    engine, prompt = engine_of("gemma2_tiny"), random_tokens(10)
    prefill(engine, 0, prompt)
    rows = [DecodeRow(0, prompt[-1], 9, GREEDY, (), 5), DecodeRow(1, 20, 5, GREEDY, (), 5)]
    clean, _ = engine.decode(rows)
    poison(engine, 1)
    neighbour, poisoned = engine.decode(rows)
    assert neighbour == clean
    assert not poisoned.is_finite


@PRESETS
@pytest.mark.parametrize("num_prompt_tokens", [1, 10, 300, 600])
def test_not_even_nan_of_an_earlier_sequence_changes_a_bit(name, num_prompt_tokens, engine_of):
    engine, prompt = engine_of(name), random_tokens(num_prompt_tokens)
    clean = continue_alone(engine, prompt, 5, slot=2)
    poison(engine, 2)
    assert continue_alone(engine, prompt, 5, slot=2) == clean


@pytest.mark.parametrize(
    ("num_slots", "buckets"),
    [(1, (2,)), (2, (2,)), (3, (2, 4)), (5, (2, 4, 8)), (8, (2, 4, 8)), (64, (2, 4, 8))],
)
def test_decode_programs_have_two_four_or_eight_rows(num_slots, buckets):
    assert row_buckets(num_slots) == buckets
