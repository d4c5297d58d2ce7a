"""The engine on tiny presets: the same answer by another road."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.engine import load
from model.engine_programs import row_buckets
from model.errors import SequenceTooLong, TokenOutOfRange, UnsupportedPreset
from model.gemma.forward import forward
from model.kernels.library import load_kernels
from model.progress import no_progress
from model.slots import (
    MAX_LOGPROBS,
    MAX_STEPS,
    DecodeRow,
    EngineOptions,
    PromptChunk,
    RowRules,
    Sampling,
)
from tests import goldens

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)
compiled_forward = jax.jit(forward, static_argnums=0)
PRESETS = pytest.mark.parametrize("name", goldens.TINY_PRESETS)
PATHS = pytest.mark.parametrize(("name", "kernels"), goldens.PATHS)


def random_tokens(num_tokens, seed=0):
    return np.random.default_rng(seed).integers(12, 512, num_tokens).tolist()


def run_chunks(engine, *chunks):
    for _ in engine.prefill(chunks):
        pass


def chunks_of(engine, slot, prompt, num_held=0):
    """All but the last token, in chunks, from the first that is not held."""
    size, end = engine.info.chunk_tokens, len(prompt) - 1
    return [
        PromptChunk(slot, prompt[start : min(start + size, end)], start)
        for start in range(num_held, end, size)
    ]


def prefill(engine, slot, prompt):
    engine.begin(slot, prompt)
    for chunk in chunks_of(engine, slot, prompt):
        run_chunks(engine, chunk)


def continue_alone(engine, prompt, num_tokens, *, slot=0, sampling=GREEDY):
    """Tokens and log-probabilities of one sequence with the engine to itself."""
    prefill(engine, slot, prompt)
    [continued] = continue_together(engine, {slot: prompt}, num_tokens, {slot: sampling})
    return continued


def rules_of(prompt, num_tokens, sampling=GREEDY, **others):
    end = len(prompt) + num_tokens
    return RowRules(sampling, len(prompt), end, **{"num_logprobs": 0, **others})


def continue_together(engine, prompts, num_tokens, samplings, *, num_steps=1):
    """Tokens and log-probabilities of prompts that their slots hold already, in that order."""
    rules = {slot: rules_of(ids, num_tokens, samplings[slot]) for slot, ids in prompts.items()}
    for slot, prompt in prompts.items():
        engine.begin(slot, prompt)
    drawn = {slot: [] for slot in prompts}
    for done in range(0, num_tokens, num_steps):
        rows = [
            DecodeRow(slot, len(prompt) - 1 + done, rules[slot]) for slot, prompt in prompts.items()
        ]
        for row, tokens in zip(rows, engine.decode(rows, num_steps).tokens(), strict=True):
            drawn[row.slot] += tokens
    return [
        ([token.token_id for token in tokens], [token.logprob for token in tokens])
        for tokens in drawn.values()
    ]


def one_step(engine, *rows):
    """What each row draws, in one step."""
    return [token for (token,) in engine.decode(rows, 1).tokens()]


def full_logprobs(name, tokens):
    """log p of every token given those before it, from one forward pass."""
    model = goldens.backbone(name)
    # Padded to one length, so that each preset compiles once; what follows a token cannot matter.
    token_ids = np.zeros((1, 768), np.int32)
    token_ids[0, : len(tokens)] = tokens
    mask = np.arange(768)[None] < len(tokens)
    logits = compiled_forward(model.config, model.gemma_weights, token_ids, mask).logits[0]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))[: len(tokens)]


@PATHS
@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 33, 256, 257, 258, 700])
def test_prefill_and_decode_equal_one_full_forward_pass(
    name, kernels, num_prompt_tokens, engine_of
):
    prompt = random_tokens(num_prompt_tokens)
    completion, logprobs = continue_alone(engine_of(name, kernels), prompt, 8)
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


@PATHS
def test_rows_of_a_batch_answer_as_they_do_alone_to_the_last_bit(name, kernels, engine_of):
    engine = engine_of(name, kernels)
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
    rules = rules_of(prompt, 1, hot, num_logprobs=MAX_LOGPROBS)
    (sampled,) = one_step(engine, DecodeRow(0, 19, rules))
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


def test_stop_ids_are_not_drawn_before_a_row_may_stop(engine_of):
    engine, prompt = engine_of("gemma3_tiny"), random_tokens(10)
    prefill(engine, 0, prompt)
    stop_ids = ()
    for _ in range(6):
        rules = rules_of(prompt, 9, stop_ids=stop_ids, may_stop_at=11)
        (sampled,) = one_step(engine, DecodeRow(0, 9, rules))
        assert sampled.token_id not in stop_ids
        stop_ids = (*stop_ids, sampled.token_id)
    (sampled,) = one_step(engine, DecodeRow(0, 9, rules_of(prompt, 9, stop_ids=stop_ids)))
    assert sampled.token_id == stop_ids[0]


@PRESETS
def test_several_steps_of_a_dispatch_draw_what_single_steps_do_to_the_last_bit(name, engine_of):
    engine = engine_of(name)
    prompts = {slot: random_tokens(n, seed=n) for slot, n in ((2, 300), (0, 3), (1, 254))}
    hot = Sampling(0.7, 40, 1.0, 8, repetition_penalty=1.4, frequency_penalty=0.3)
    samplings = {0: GREEDY, 1: Sampling(1.5, 0, 0.9, 7), 2: hot}
    for slot, prompt in prompts.items():
        prefill(engine, slot, prompt)
    expected = continue_together(engine, prompts, 10, samplings)
    for num_steps in (3, MAX_STEPS):
        got = continue_together(engine, prompts, 10, samplings, num_steps=num_steps)
        assert got == expected


def test_a_row_ends_at_a_stop_id_or_at_its_length_and_the_others_go_on(engine_of):
    engine = engine_of("gemma3_tiny")
    prompts = {slot: random_tokens(4 + slot, seed=slot) for slot in range(3)}
    alone = {
        slot: continue_alone(engine, prompt, MAX_STEPS, slot=slot)[0]
        for slot, prompt in prompts.items()
    }
    stop_id = alone[1][3]
    rules = {
        0: rules_of(prompts[0], 5),
        1: rules_of(prompts[1], MAX_STEPS, stop_ids=(stop_id,)),
        2: rules_of(prompts[2], MAX_STEPS),
    }
    for slot, prompt in prompts.items():
        engine.begin(slot, prompt)
    rows = [DecodeRow(slot, len(prompts[slot]) - 1, rules[slot]) for slot in prompts]
    drawn = [[token.token_id for token in tokens] for tokens in engine.decode(rows, 8).tokens()]
    num_until_stop = alone[1].index(stop_id) + 1
    assert drawn == [alone[0][:5], alone[1][:num_until_stop], alone[2]]
    # What has ended draws nothing in a dispatch that was asked for before that was known.
    late = [DecodeRow(slot, len(prompts[slot]) - 1 + MAX_STEPS, rules[slot]) for slot in (0, 1)]
    assert engine.decode(late, 2).tokens() == [[], []]


@PRESETS
def test_prompts_that_are_prefilled_together_are_continued_as_alone_to_the_last_bit(
    name, engine_of
):
    engine = engine_of(name)
    # 1 + 20 + 43 tokens fill a chunk; the last one has the end of a longer prompt.
    prompts = {3: random_tokens(2, seed=2), 1: random_tokens(21, seed=21), 0: random_tokens(300, 5)}
    samplings = dict.fromkeys(prompts, Sampling(1.5, 0, 0.9, 7))
    alone = [
        continue_alone(engine, prompt, 6, slot=slot, sampling=samplings[slot])
        for slot, prompt in prompts.items()
    ]
    for slot in prompts:
        poison(engine, slot)
    *first, last = chunks_of(engine, 0, prompts[0])
    run_chunks(engine, *first)
    others = [chunk for slot in (3, 1) for chunk in chunks_of(engine, slot, prompts[slot])]
    run_chunks(engine, *others, last)
    assert continue_together(engine, prompts, 6, samplings) == alone


def test_a_prefill_that_pauses_at_every_layer_changes_nothing_for_itself_or_others(engine_of):
    engine = engine_of("gemma3_tiny")
    long, short = random_tokens(200), random_tokens(9, seed=1)
    expected = continue_alone(engine, long, 5)
    beside = continue_alone(engine, short, 12, slot=1)
    prefill(engine, 1, short)
    poison(engine, 0)
    engine.begin(0, long)
    rules = rules_of(short, 12)
    drawn = []
    for part, _ in enumerate(engine.prefill(chunks_of(engine, 0, long))):
        drawn += one_step(engine, DecodeRow(1, 8 + part, rules))
    assert len(drawn) == engine.info.num_layers
    assert [token.token_id for token in drawn] == beside[0][: len(drawn)]
    assert [token.logprob for token in drawn] == beside[1][: len(drawn)]
    assert continue_together(engine, {0: long}, 5, {0: GREEDY}) == [expected]


# A ring of 512 positions: the third block takes the place of the first.
@PRESETS
@pytest.mark.parametrize(("num_tokens", "num_kept"), [(257, 1), (300, 1), (769, 3), (800, 3)])
def test_a_restored_prompt_is_continued_as_a_prefilled_one_to_the_last_bit(
    name, num_tokens, num_kept, engine_of
):
    engine, prompt = engine_of(name), random_tokens(num_tokens)
    alone = continue_alone(engine, prompt, 8, slot=1)
    keys = [f"{name}{num_tokens}{block}".encode() for block in range(num_kept)]
    engine.begin(0, prompt)
    for block, chunk in enumerate(chunks_of(engine, 0, prompt)):
        run_chunks(engine, chunk)
        if len(chunk.token_ids) == 256:
            engine.keep(0, keys[: block + 1])
    poison(engine, 2)
    assert engine.restore(2, [*keys, b"of another prompt"]) == num_kept
    for chunk in chunks_of(engine, 2, prompt, num_held=256 * num_kept):
        run_chunks(engine, chunk)
    assert continue_together(engine, {2: prompt}, 8, {2: GREEDY}) == [alone]


def test_a_block_that_is_not_finite_is_not_kept(engine_of):
    engine = engine_of("gemma2_tiny")
    poison(engine, 1)
    engine.keep(1, [b"poisoned"])
    assert engine.restore(0, [b"poisoned"]) == 0


def test_nothing_compiles_once_an_engine_is_loaded(engine_of):
    engine = engine_of("gemma3_tiny")
    before = engine.num_compilations
    assert before > 0
    for num_tokens in (1, 5, 40, 100, 200, 256, 257, 600):
        continue_alone(engine, random_tokens(num_tokens), 2, sampling=Sampling(1.0, 5, 0.5, 1))
        engine.copy(0, [1, 2], num_tokens)
    for num_rows in (1, 2, 3, 4):
        rows = [
            DecodeRow(
                slot,
                slot,
                RowRules(
                    Sampling(0.1 * slot, slot, 1 - 0.2 * slot, slot, 0.1 * slot, 1.0 + slot),
                    num_prompt=slot + 1,
                    end=20 + slot,
                    stop_ids=tuple(range(slot)),
                    may_stop_at=slot,
                    num_logprobs=slot or None,
                ),
            )
            for slot in range(num_rows)
        ]
        engine.decode(rows, 2 * num_rows).wait()
    run_chunks(engine, PromptChunk(0, [5] * 20, 0), PromptChunk(3, [6] * 30, 256))
    engine.keep(0, [b"x"])
    engine.restore(1, [b"x"])
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
        run_chunks(engine, PromptChunk(0, [5, token_id], 0))
    with pytest.raises(TokenOutOfRange):
        engine.begin(0, [token_id])


@pytest.mark.parametrize(("start", "num_tokens"), [(1024, 1), (768, 257), (250, 7)])
def test_a_chunk_outside_its_slot_or_over_a_border_is_refused(start, num_tokens, engine_of):
    with pytest.raises(SequenceTooLong):
        run_chunks(engine_of("gemma1_tiny"), PromptChunk(0, [5] * num_tokens, start))


def test_a_chunk_begins_at_a_multiple_of_the_block_where_bits_depend_on_its_shape(engine_of):
    with pytest.raises(SequenceTooLong, match="cannot start at 1: it starts at a multiple of 256"):
        run_chunks(engine_of("gemma3_tiny", "xla"), PromptChunk(0, [5] * 5, 1))


def test_prompts_that_do_not_fit_into_a_shared_chunk_are_refused(engine_of):
    with pytest.raises(SequenceTooLong, match="hold 1 to 64 tokens"):
        run_chunks(engine_of("gemma1_tiny"), PromptChunk(0, [5], 0), PromptChunk(1, [5] * 65, 0))


def poison(engine, slot):
    """Fills one slot of every layer with NaN."""
    caches = [
        type(cache)(cache.keys.at[slot].set(jnp.nan), cache.values.at[slot].set(jnp.nan))
        for cache in engine._states.caches
    ]
    engine._states = engine._states._replace(caches=caches)


def test_a_poisoned_slot_is_noticed_and_changes_no_other_row(engine_of):
    engine, prompt = engine_of("gemma2_tiny"), random_tokens(10)
    prefill(engine, 0, prompt)
    rules = rules_of(prompt, 5, num_logprobs=5)
    rows = [DecodeRow(0, 9, rules), DecodeRow(1, 9, rules)]
    clean, _ = one_step(engine, *rows)
    poison(engine, 1)
    neighbour, poisoned = one_step(engine, *rows)
    assert neighbour == clean
    assert not poisoned.is_finite
    # Nothing follows it in a longer dispatch.
    poison(engine, 1)
    assert [len(tokens) for tokens in engine.decode(rows, 4).tokens()] == [4, 1]


@PRESETS
@pytest.mark.parametrize("num_prompt_tokens", [1, 10, 300, 600])
def test_not_even_nan_of_an_earlier_sequence_changes_a_bit(name, num_prompt_tokens, engine_of):
    engine, prompt = engine_of(name), random_tokens(num_prompt_tokens)
    clean = continue_alone(engine, prompt, 5, slot=2)
    poison(engine, 2)
    assert continue_alone(engine, prompt, 5, slot=2) == clean


@pytest.mark.parametrize(
    ("num_slots", "xla", "native"),
    [
        (1, (2,), (1,)),
        (2, (2,), (1, 2)),
        (3, (2, 4), (1, 2, 4)),
        (8, (2, 4, 8), (1, 2, 4, 8)),
        (9, (2, 4, 8), (1, 2, 4, 8, 16)),
        (64, (2, 4, 8), (1, 2, 4, 8, 16, 32)),
    ],
)
def test_decode_programs_have_up_to_thirty_two_rows_and_with_xla_two_to_eight(
    num_slots, xla, native
):
    assert row_buckets(num_slots, is_native=False) == xla
    assert row_buckets(num_slots, is_native=True) == native


@pytest.mark.parametrize("choice", ["auto", "xla"])
def test_the_engine_says_which_kernels_it_computes_with(choice, engine_of):
    info = engine_of("gemma3_tiny", choice).info
    kernels = load_kernels(choice)

    assert (info.kernels, info.kernels_reason) == (kernels.name, kernels.reason or None)
    assert (info.kernels == "xla") == (info.kernels_reason is not None)


def test_a_joined_turn_gives_rows_and_prompts_what_each_gets_alone(engine_of):
    engine = engine_of("gemma3_tiny")
    if not engine.info.joined_tokens:
        pytest.skip(f"kernels here: {engine.info.kernels}")
    long, short, stream = random_tokens(300, 1), random_tokens(9, 2), random_tokens(40, 3)
    sampling = Sampling(temperature=0.9, top_k=0, top_p=0.95, seed=7)
    alone = [continue_alone(engine, prompt, 6) for prompt in (long, short)]
    expected = continue_alone(engine, stream, 12, sampling=sampling)

    prefill(engine, 0, stream)
    rules = rules_of(stream, 12, sampling)
    spans = [(0, 40), (40, 77), (77, 129), (129, 181), (181, 233), (233, 256), (256, 299)]
    dispatches = []
    engine.begin(1, long)
    engine.begin(2, short)
    for turn, (start, end) in enumerate(spans):
        chunks = [PromptChunk(1, long[start:end], start)]
        if turn == 0:
            chunks.append(PromptChunk(2, short[:-1], 0))
        # None waits for the one before it.
        dispatches.append(engine.join(chunks, [DecodeRow(0, 39 + turn, rules)]))
    drawn = [(token.token_id, token.logprob) for each in dispatches for [token] in each.tokens()]
    assert drawn == list(zip(*expected, strict=True))[: len(spans)]
    rest = continue_together(engine, {1: long, 2: short}, 6, {1: GREEDY, 2: GREEDY})
    assert rest == alone


def test_what_cannot_be_joined_is_refused(engine_of):
    engine = engine_of("gemma1_tiny")
    if not engine.info.joined_tokens:
        pytest.skip(f"kernels here: {engine.info.kernels}")
    row = DecodeRow(0, 0, rules_of([5], 3))
    with pytest.raises(ValueError, match="53 tokens of 1 prompts and 1 rows cannot be joined"):
        engine.join([PromptChunk(1, [5] * 53, 0)], [row])
    with pytest.raises(ValueError, match="0 rows cannot be joined"):
        engine.join([PromptChunk(1, [5], 0)], [])
