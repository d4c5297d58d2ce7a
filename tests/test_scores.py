"""Scores of the engine on tiny presets: the same numbers by another road, in any company."""

import itertools

import numpy as np
import pytest

from model.errors import SequenceTooLong, TokenOutOfRange
from model.score_slots import HEAD_PAIRS, AskedPlace, ScoreChunk
from tests import goldens
from tests.test_engine import (
    GREEDY,
    continue_alone,
    continue_together,
    full_logprobs,
    prefill,
    random_tokens,
)

PRESETS = pytest.mark.parametrize("name", goldens.TINY_PRESETS)


def read(engine, *chunks):
    """The residuals that the chunks want, read together."""
    reading = engine.read(chunks)
    while True:
        try:
            next(reading)
        except StopIteration as done:
            return done.value


def pieces_of(slot, token_ids, start=0, wanted=None):
    """Chunks of a text from ``start`` on, none across a block; every place is wanted, or some."""
    end = start + len(token_ids)
    borders = [start, *range((start // 256 + 1) * 256, end, 256), end]
    for low, high in itertools.pairwise(borders):
        places = range(low, high) if wanted is None else [p for p in wanted if low <= p < high]
        yield ScoreChunk(
            slot, token_ids[low - start : high - start], low, tuple(p - low for p in places)
        )


def residuals_of(engine, token_ids, slot=0):
    return [each for piece in pieces_of(slot, token_ids) for each in read(engine, piece)]


def logprobs_of(engine, residuals, targets):
    """Of one token behind each place, as many at once as fit."""
    found, most = [], engine.info.head_places
    for first in range(0, len(targets), most):
        pairs = zip(residuals[first:][:most], targets[first:][:most], strict=False)
        found += engine.measure([AskedPlace(residual, (id_,)) for residual, id_ in pairs])
    return [score.logprobs[0] for score in found]


@PRESETS
@pytest.mark.parametrize("num_tokens", [2, 64, 130, 257, 700])
def test_a_text_has_the_log_probabilities_of_one_full_forward_pass(name, num_tokens, engine_of):
    text = random_tokens(num_tokens)
    residuals = residuals_of(engine_of(name), text[:-1])
    found = logprobs_of(engine_of(name), residuals, text[1:])
    expected = full_logprobs(name, text)[np.arange(num_tokens - 1), text[1:]]
    # Of random tokens: the less likely, the larger the logits that cancel.
    np.testing.assert_allclose(found, expected, atol=5e-4, rtol=0)


@PRESETS
def test_f_r7_what_was_generated_scores_as_it_was_drawn(name, engine_of):
    engine, prompt = engine_of(name), random_tokens(60)
    completion, drawn = continue_alone(engine, prompt, 12)
    text = prompt + completion
    found = logprobs_of(engine, residuals_of(engine, text[:-1])[59:], completion)
    np.testing.assert_allclose(found, drawn, atol=5e-5, rtol=0)


# A context that ends inside a block, at its end, one token behind it, and where the ring of a local
# layer has gone round; 249 + 11 cross a border.
@PRESETS
@pytest.mark.parametrize("num_context", [1, 30, 249, 256, 257, 757])
def test_a_continuation_has_the_same_bits_alone_and_behind_others(name, num_context, engine_of):
    engine, context = engine_of(name), random_tokens(num_context)
    targets = [random_tokens(n, seed=n) for n in (11, 1, 5, 11)]
    expected = []
    for target in targets:
        residuals_of(engine, random_tokens(800, seed=9), slot=1)
        residuals_of(engine, context, slot=1)
        pieces = pieces_of(1, target, num_context)
        expected.append([each.tobytes() for piece in pieces for each in read(engine, piece)])
    residuals_of(engine, context)
    together = [piece for target in targets for piece in pieces_of(0, target, num_context)]
    found = [residual.tobytes() for residual in read(engine, *together)]
    assert found == [residual for each in expected for residual in each]
    for target, residuals in zip(targets, expected, strict=True):
        logprobs = full_logprobs(name, context + target)[num_context - 1 :]
        asked = [AskedPlace(np.frombuffer(each, np.float32), (7,)) for each in residuals]
        scores = [score.logprobs[0] for score in engine.measure(asked)]
        # Of up to 35, behind 768 positions: two orders of summation differ by 1.2e-5 of that.
        np.testing.assert_allclose(scores, logprobs[1:, 7], atol=2e-4, rtol=1e-5)


@PRESETS
def test_texts_that_are_read_together_in_one_slot_have_the_bits_of_each_alone(name, engine_of):
    engine = engine_of(name)
    texts = [random_tokens(n, seed=n) for n in (3, 20, 1, 40)]
    alone = [[each.tobytes() for each in residuals_of(engine, text)] for text in texts]
    residuals_of(engine, [5] * 200)
    together = read(engine, *[piece for text in texts for piece in pieces_of(0, text)])
    assert [each.tobytes() for each in together] == [each for text in alone for each in text]


def test_a_place_is_measured_to_the_same_bits_in_any_company(engine_of):
    engine = engine_of("gemma2_tiny")
    residuals = residuals_of(engine, random_tokens(engine.info.head_places))
    places = [
        AskedPlace(residual, (row, 500 - row), num_top=row % 3)
        for row, residual in enumerate(residuals)
    ]
    alone = [engine.measure([place])[0] for place in places]
    assert engine.measure(places) == alone
    assert engine.measure(places[::-1])[::-1] == alone


def test_ranks_and_alternatives_are_those_of_the_whole_distribution(engine_of):
    engine, text = engine_of("gemma3_tiny"), random_tokens(20)
    residual = residuals_of(engine, text)[-1]
    expected = full_logprobs("gemma3_tiny", text)[-1]
    order = np.argsort(-expected, kind="stable").tolist()
    [score] = engine.measure([AskedPlace(residual, (order[0], order[5], order[400]), num_top=20)])
    assert score.ranks == (0, 5, 400)
    assert [token_id for token_id, _ in score.top] == order[:20]
    np.testing.assert_allclose([p for _, p in score.top], expected[order[:20]], atol=2e-4)
    assert score.logprobs[1] == score.top[5][1]


def test_logits_come_where_they_are_wanted(engine_of):
    engine, text = engine_of("gemma3_tiny"), random_tokens(20)
    residuals = residuals_of(engine, text)
    wanted, unwanted = engine.measure(
        [AskedPlace(residuals[-1], (3,), wants_logits=True), AskedPlace(residuals[0], (3,))]
    )
    logits = np.frombuffer(wanted.logits, "<f4")
    assert unwanted.logits == b""
    expected = full_logprobs("gemma3_tiny", text)[-1]
    found = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_the_stored_scores_of_keras_hub_are_met(engine_of):
    arrays = goldens.arrays("gemma2_tiny")
    token_ids, mask = arrays["fwd.token_ids"], arrays["fwd.padding_mask"]
    rows = [row for row in range(len(mask)) if mask[row, 0] and (np.diff(mask[row] * 1) <= 0).all()]
    assert len(rows) == 2, "a full one and one that is padded on the right"
    for row in rows:
        num_tokens = int(mask[row].sum())
        ids, targets = token_ids[row, :num_tokens], arrays["score.target_ids"][row, :num_tokens]
        residuals = residuals_of(engine_of("gemma2_tiny"), ids.tolist())
        found = logprobs_of(engine_of("gemma2_tiny"), residuals, targets.tolist())
        expected = -arrays["score.loss"][row, :num_tokens]
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


def test_scoring_leaves_the_sequences_that_are_generated_alone(engine_of):
    engine = engine_of("gemma3_tiny")
    prompts = {slot: random_tokens(20 + slot, seed=slot) for slot in range(4)}
    alone = [continue_alone(engine, prompt, 6, slot=slot) for slot, prompt in prompts.items()]
    for slot, prompt in prompts.items():
        prefill(engine, slot, prompt)
    residuals_of(engine, random_tokens(1000, seed=5), slot=0)
    residuals_of(engine, random_tokens(1000, seed=6), slot=1)
    assert continue_together(engine, prompts, 6, dict.fromkeys(prompts, GREEDY)) == alone


def test_a_place_that_is_not_finite_says_so_and_its_neighbours_do_not(engine_of):
    engine = engine_of("gemma2_tiny")
    good = residuals_of(engine, random_tokens(5))[-1]
    bad = np.full_like(good, np.nan)
    expected, *_ = engine.measure([AskedPlace(good, (3,))])
    found = engine.measure([AskedPlace(bad, (3,)), AskedPlace(good, (3,))])
    assert [score.is_finite for score in found] == [False, True]
    assert found[1] == expected


def test_what_does_not_fit_is_refused(engine_of):
    engine = engine_of("gemma2_tiny")
    residual = residuals_of(engine, [5])[0]
    with pytest.raises(SequenceTooLong, match="cannot start at 250"):
        read(engine, ScoreChunk(0, [5] * 7, 250))
    with pytest.raises(SequenceTooLong, match="end within 1024"):
        read(engine, ScoreChunk(0, [5] * 3, 1022))
    with pytest.raises(TokenOutOfRange):
        read(engine, ScoreChunk(0, [512], 0))
    with pytest.raises(TokenOutOfRange):
        engine.measure([AskedPlace(residual, (-1,))])
    most = engine.info.head_places
    with pytest.raises(ValueError, match=f"at most {most} and {HEAD_PAIRS}"):
        engine.measure([AskedPlace(residual, (1,))] * (most + 1))


def test_nothing_compiles_for_a_score_once_an_engine_is_loaded(engine_of):
    engine = engine_of("gemma3_tiny")
    before = engine.num_compilations
    for num_tokens in (1, 70, 200, 300):
        residuals = residuals_of(engine, random_tokens(num_tokens))
        engine.measure([AskedPlace(residuals[-1], tuple(range(64)), num_top=3)])
    read(engine, *[ScoreChunk(1, [6, 7], 300, (0,))] * 16)
    assert engine.num_compilations == before
