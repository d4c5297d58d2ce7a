"""Beam and contrastive search on an engine's slots: what the Keras-named samplers do, and alone."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from model import samplers
from model.engine import load
from model.generation import Generator, padded_rows
from model.progress import no_progress
from model.search_slots import Beam, BeamStep, CandidateStep, SearchRules
from model.searches import search_row_buckets
from model.slots import DecodeRow, EngineOptions, PromptChunk, RowRules, Sampling
from tests import goldens

PRESETS = pytest.mark.parametrize("name", goldens.TINY_PRESETS)
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)
NO_RULES = SearchRules(num_logprobs=3)


def random_tokens(num_tokens, seed=0):
    return np.random.default_rng(seed).integers(12, 512, num_tokens).tolist()


def prefill(engine, slot, prompt):
    """All but the last token, in chunks."""
    engine.begin(slot, prompt)
    chunk = engine.info.chunk_tokens
    for start in range(0, len(prompt) - 1, chunk):
        ids = prompt[start : min(start + chunk, len(prompt) - 1)]
        for _ in engine.prefill([PromptChunk(slot, ids, start)]):
            pass


def decode(engine, slot, position, prompt, sampling=GREEDY):
    """One token, from one step of one row."""
    rules = RowRules(sampling, len(prompt), engine.info.context_tokens, num_logprobs=3)
    [[token]] = engine.decode([DecodeRow(slot, position, rules)], 1).tokens()
    return token


def continue_alone(engine, prompt, num_tokens, *, slot=0, sampling=GREEDY):
    """Tokens and log-probabilities of one sequence with the engine to itself."""
    prefill(engine, slot, prompt)
    positions = range(len(prompt) - 1, len(prompt) - 1 + num_tokens)
    drawn = [decode(engine, slot, position, prompt, sampling) for position in positions]
    return [token.token_id for token in drawn], [token.logprob for token in drawn]


def poison(engine, slot):
    """Fills one slot of every layer with NaN."""
    engine._states = engine._states._replace(
        caches=[
            type(cache)(cache.keys.at[slot].set(jnp.nan), cache.values.at[slot].set(jnp.nan))
            for cache in engine._states.caches
        ]
    )


def shared_prompt(engine, slots, prompt):
    """In all slots, as a scheduler would have it."""
    prefill(engine, slots[0], prompt)
    engine.copy(slots[0], slots[1:], len(prompt) - 1)


def search_beams(
    engine, prompt, num_beams, num_tokens, *, slots=None, rules=NO_RULES, between=None
):
    """Tokens, the log-probability and the token's own log-probabilities of each beam, best first.

    ``between`` runs before every step.
    """
    slots = tuple(range(num_beams)) if slots is None else slots
    shared_prompt(engine, slots, prompt)
    beams = (Beam(slots[0], prompt[-1], 0.0),)
    found = [((), ())]
    for position in range(len(prompt) - 1, len(prompt) - 1 + num_tokens):
        if between is not None:
            between()
        step = BeamStep(slots, beams, position, len(prompt) - 1, rules)
        extensions = engine.step_beams(step)
        found = [
            ((*found[each.source][0], each.token.token_id), (*found[each.source][1], each.token))
            for each in extensions
        ]
        beams = tuple(each.beam for each in extensions)
        assert sorted(beam.slot for beam in beams) == sorted(slots)
    return [(ids, beam.logprob, own) for (ids, own), beam in zip(found, beams, strict=True)]


def search_contrastively(engine, prompt, k, alpha, num_tokens, *, slots=None, between=None):
    """Tokens with their log-probabilities."""
    slots = tuple(range(k)) if slots is None else slots
    engine.keep_hidden(slots[0])
    shared_prompt(engine, slots, prompt)
    token_ids, probabilities, position = (prompt[-1],) * k, (1.0,) * k, len(prompt) - 1
    candidates, found = None, []
    for _ in range(num_tokens + 1):
        if between is not None:
            between()
        step = CandidateStep(slots, token_ids, probabilities, position, alpha, NO_RULES)
        choice = engine.step_candidates(step)
        if candidates is not None:
            found.append(candidates[choice.place])
        candidates, probabilities = choice.candidates, choice.probabilities
        token_ids, position = tuple(token.token_id for token in candidates), position + 1
    engine.drop_hidden(slots[0])
    return found


@functools.cache
def generator(name, sampler):
    return Generator(goldens.backbone(name).config, sampler, run_eagerly=False)


@functools.cache
def beam_sampler(num_beams):
    return samplers.BeamSampler(num_beams=num_beams, return_all_beams=True)


@functools.cache
def contrastive_sampler(k, alpha):
    return samplers.ContrastiveSampler(k=k, alpha=alpha)


@pytest.fixture(scope="module")
def wide_engine(cache_dir):
    """Eight slots, so that searches of more than four have room."""
    preset = str(goldens.preset_directory("gemma2_tiny"))
    return load(EngineOptions(preset, 8, 1024, cache_dir), no_progress)


def by_the_library(name, sampler, prompt, num_tokens):
    """What the sampler writes behind one prompt, stop ids off."""
    ids = np.zeros((1, len(prompt) + num_tokens), np.int32)
    ids[0, : len(prompt)] = prompt
    mask = np.arange(ids.shape[1])[None] < len(prompt)
    result = generator(name, sampler).fill(
        goldens.backbone(name).gemma_weights, padded_rows(ids, mask, ())
    )
    return result, slice(len(prompt), len(prompt) + num_tokens)


# 250 goes on into a second block; 508 into the second round of a ring of 512 positions.
@pytest.mark.parametrize(
    ("name", "num_beams", "num_prompt_tokens"),
    [
        ("gemma1_tiny", 2, 1),
        ("gemma1_tiny", 4, 250),
        ("gemma2_tiny", 3, 20),
        ("gemma3_tiny", 4, 508),
        ("wide", 5, 20),
        ("wide", 8, 508),
    ],
)
def test_beams_are_those_of_the_library(name, num_beams, num_prompt_tokens, engine_of, wide_engine):
    engine, name = (wide_engine, "gemma2_tiny") if name == "wide" else (engine_of(name), name)
    prompt = random_tokens(num_prompt_tokens)
    found = search_beams(engine, prompt, num_beams, 12)
    (rows, logprobs), columns = by_the_library(name, beam_sampler(num_beams), prompt, 12)
    assert [list(ids) for ids, _, _ in found] == np.asarray(rows)[0, :, columns].tolist()
    np.testing.assert_allclose([value for _, value, _ in found], logprobs[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "k", "alpha", "num_prompt_tokens"),
    [
        ("gemma1_tiny", 4, 0.6, 1),
        ("gemma2_tiny", 2, 0.6, 250),
        ("gemma3_tiny", 4, 0.6, 508),
        ("wide", 5, 0.4, 20),
        ("wide", 8, 0.9, 508),
    ],
)
def test_contrastive_search_chooses_the_tokens_of_the_library(
    name, k, alpha, num_prompt_tokens, engine_of, wide_engine
):
    engine, name = (wide_engine, "gemma2_tiny") if name == "wide" else (engine_of(name), name)
    prompt = random_tokens(num_prompt_tokens)
    found = search_contrastively(engine, prompt, k, alpha, 12)
    rows, columns = by_the_library(name, contrastive_sampler(k, alpha), prompt, 12)
    tokens = [token.token_id for token in found]
    assert tokens == np.asarray(rows)[0, columns].tolist()
    assert tokens != continue_alone(engine, prompt, 12)[0], "the search did not choose"


@PRESETS
def test_contrastive_search_without_novelty_is_greedy_to_the_last_bit(name, engine_of):
    engine, prompt = engine_of(name), random_tokens(300)
    tokens, logprobs = continue_alone(engine, prompt, 10)
    found = search_contrastively(engine, prompt, 3, 0.0, 10)
    assert [token.token_id for token in found] == tokens
    assert [token.logprob for token in found] == logprobs


@PRESETS
def test_the_tokens_of_a_beam_are_measured_as_decode_measures_them_to_the_last_bit(name, engine_of):
    engine, prompt = engine_of(name), random_tokens(40)
    for ids, logprob, own in search_beams(engine, prompt, 3, 6):
        prefill(engine, 3, prompt)
        for place, token in enumerate(own):
            # A bias that makes decode draw what the beam has, and changes no log-probability.
            sampling = dataclasses.replace(GREEDY, logit_bias=((ids[place], 100.0),))
            position = len(prompt) - 1 + place
            assert decode(engine, 3, position, prompt, sampling) == token
        total = sum(token.logprob for token in own)
        assert logprob == pytest.approx(total, abs=1e-5)


@pytest.fixture
def company(engine_of):
    """A stranger in slot 3 who decodes before every step, and what he should say."""
    engine, prompt = engine_of("gemma3_tiny"), random_tokens(510, seed=9)
    hot = Sampling(1.5, 0, 0.9, 7)
    alone = continue_alone(engine, prompt, 13, slot=3, sampling=hot)[0]
    prefill(engine, 3, prompt)
    tokens = list(prompt)

    def between():
        tokens.append(decode(engine, 3, len(tokens) - 1, prompt, hot).token_id)

    yield between
    said = tokens[len(prompt) :]
    assert said
    assert said == alone[: len(said)]


def test_beams_in_company_and_in_other_slots_are_the_same_to_the_last_bit(engine_of, company):
    engine, prompt = engine_of("gemma3_tiny"), random_tokens(253)
    alone = search_beams(engine, prompt, 3, 12)
    assert search_beams(engine, prompt, 3, 12, slots=(2, 0, 1), between=company) == alone


def test_contrastive_search_in_company_and_in_other_slots_is_the_same(engine_of, company):
    engine, prompt = engine_of("gemma3_tiny"), random_tokens(253)
    alone = search_contrastively(engine, prompt, 3, 0.6, 12)
    found = search_contrastively(engine, prompt, 3, 0.6, 12, slots=(2, 0, 1), between=company)
    assert found == alone


def test_a_search_is_the_same_on_an_engine_of_more_slots_to_the_last_bit(engine_of, wide_engine):
    prompt = random_tokens(40)
    assert search_beams(engine_of("gemma2_tiny"), prompt, 4, 10) == search_beams(
        wide_engine, prompt, 4, 10, slots=(7, 2, 5, 0)
    )


def test_another_last_token_would_be_noticed(engine_of):
    """What is compared changes with the least part of what came before."""
    engine, prompt = engine_of("gemma3_tiny"), random_tokens(253)
    changed = [*prompt[:-1], prompt[-1] + 1]
    assert search_beams(engine, prompt, 3, 6) != search_beams(engine, changed, 3, 6)
    first, second = (search_contrastively(engine, each, 3, 0.6, 6) for each in (prompt, changed))
    assert first != second


def one_step(engine, prompt, rules, slots=(0, 1)):
    shared_prompt(engine, slots, prompt)
    beams = (Beam(slots[0], prompt[-1], 0.0),)
    return engine.step_beams(BeamStep(slots, beams, len(prompt) - 1, len(prompt) - 1, rules))


def test_a_done_beam_keeps_its_score_and_competes_with_it(engine_of):
    engine, prompt = engine_of("gemma2_tiny"), random_tokens(20)
    first, second = one_step(engine, prompt, NO_RULES)
    done = dataclasses.replace(first.beam, is_done=True)
    step = BeamStep((0, 1), (done, second.beam), len(prompt), len(prompt) - 1, NO_RULES)
    best, other = engine.step_beams(step)
    assert (best.source, best.token, best.beam.is_done) == (0, None, True)
    assert (best.beam.logprob, best.beam.token_id) == (first.beam.logprob, first.beam.token_id)
    assert (other.source, other.beam.is_done) == (1, False)
    assert other.beam.logprob < second.beam.logprob
    # One that is worse than two continuations of the other falls out.
    bad = dataclasses.replace(done, logprob=-1000.0)
    step = BeamStep((0, 1), (bad, other.beam), len(prompt) + 1, len(prompt) - 1, NO_RULES)
    assert [each.source for each in engine.step_beams(step)] == [1, 1]


def test_bans_and_biases_choose_but_are_not_in_the_measure(engine_of):
    engine, prompt = engine_of("gemma3_tiny"), random_tokens(20)
    plain = one_step(engine, prompt, NO_RULES)
    likeliest = [each.token.token_id for each in plain]
    banned = one_step(engine, prompt, SearchRules(tuple(likeliest), num_logprobs=3))
    assert not {each.token.token_id for each in banned} & set(likeliest)
    # Without the two, what is left shares their probability.
    gained = [each.beam.logprob - each.token.logprob for each in banned]
    lost = sum(np.exp(each.token.logprob) for each in plain)
    np.testing.assert_allclose(gained, [-np.log1p(-lost)] * 2, rtol=1e-3)
    assert banned[0].token.top == plain[0].token.top
    biased = one_step(engine, prompt, SearchRules((), ((400, 50.0),), 3))
    assert biased[0].token.token_id == 400
    assert biased[0].beam.logprob == pytest.approx(0.0, abs=1e-4)
    assert biased[0].token.logprob < -1
    assert one_step(engine, prompt, SearchRules())[0].token.logprob is None


def test_a_search_over_a_poisoned_slot_says_so(engine_of):
    engine, prompt = engine_of("gemma2_tiny"), random_tokens(20)
    first, second = one_step(engine, prompt, NO_RULES)
    poison(engine, second.beam.slot)
    beams = (first.beam, second.beam)
    assert engine.step_beams(BeamStep((0, 1), beams, len(prompt), 19, NO_RULES)) == []
    step = CandidateStep((0, 1), (5, 6), (0.5, 0.5), len(prompt), 0.6, NO_RULES)
    engine.keep_hidden(0)
    assert engine.step_candidates(step) is None
    engine.drop_hidden(0)


def test_what_the_slots_held_before_changes_no_bit(engine_of):
    engine, prompt = engine_of("gemma3_tiny"), random_tokens(40)
    beams = search_beams(engine, prompt, 3, 6)
    contrastive = search_contrastively(engine, prompt, 3, 0.6, 6)
    for slot in range(3):
        poison(engine, slot)
    assert search_beams(engine, prompt, 3, 6) == beams
    for slot in range(3):
        poison(engine, slot)
    assert search_contrastively(engine, prompt, 3, 0.6, 6) == contrastive


def test_nothing_compiles_in_a_search_and_all_programs_are_few(engine_of):
    engine, prompt = engine_of("gemma1_tiny"), random_tokens(300)
    before = engine.num_compilations
    for width in (2, 3, 4):
        search_beams(engine, prompt, width, 2, rules=SearchRules((3,), ((4, 1.0),), None))
        search_contrastively(engine, prompt, width, 0.3, 2)
    assert engine.num_compilations == before
    # Decisions 22 and 26 say why they are more than 24.
    assert len(engine.info.programs) <= 35


@pytest.mark.parametrize(
    ("num_slots", "buckets"), [(1, ()), (2, (4,)), (4, (4,)), (5, (4, 8)), (64, (4, 8))]
)
def test_only_searches_that_the_slots_allow_have_programs(num_slots, buckets):
    assert search_row_buckets(num_slots) == buckets
