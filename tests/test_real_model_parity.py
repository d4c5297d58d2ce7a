"""Our Gemma 3 270M against Hugging Face transformers, on the same float32 weights.

The stored answers come from ``tests/gold/run.sh``, which also prints how far we are from them: some
1e-5 for log-probabilities of the tokens that occur, up to 4e-4 for unlikely ones.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from model.engine import load
from model.progress import no_progress
from model.slots import DecodeRow, EngineOptions, Sampling
from tests.gold import our_answers
from tests.test_engine import one_step, prefill, rules_of
from tests.test_scores import logprobs_of, residuals_of

_GOLDENS = Path(__file__).parent / "goldens" / "gemma3_270m"
_CASES = {
    case.get("name", case.get("prompt")): case
    for case in json.loads((_GOLDENS / "cases.json").read_text())
    + json.loads((_GOLDENS / "long_cases.json").read_text())["cases"]
}

# Found: 5e-5 and 4e-4.
_PROMPT_TOLERANCE = 5e-4
_TOLERANCE = 2e-3
# Where transformers' best two tokens are closer than this, rounding may choose.
_CLEAR_MARGIN = 0.02


@pytest.fixture(scope="module")
def engine(cache_dir):
    # As the service loads it by default, so that its programs are compiled once for all tests.
    bank = {"adapter_slots": 16, "adapter_max_rank": 16}
    return load(EngineOptions("gemma3_270m", 8, 4096, cache_dir, **bank), no_progress)


@pytest.fixture(scope="module")
def cached(engine):
    """Name -> what decode drew, the cases two by two."""
    names = list(_CASES)
    drawn = {}
    for pair in zip(names[::2], names[1::2], strict=True):
        answers = our_answers.cached(engine, [_CASES[name] for name in pair])
        drawn |= dict(zip(pair, answers, strict=True))
    return drawn


@pytest.fixture(scope="module", params=_CASES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def full(engine, name):
    # The engine's own arrays: a second gigabyte would take seconds to read.
    return our_answers.full_forward(engine._config, engine._weights, _CASES[name])


@pytest.mark.parametrize("name", [name for name, case in _CASES.items() if "prompt" in case])
def test_text_becomes_the_ids_of_transformers(engine, name):
    case = _CASES[name]
    assert [engine.codec.bos_id, *engine.codec.encode(case["prompt"])] == case["token_ids"]


def test_a_full_forward_gives_prompt_tokens_the_logprobs_of_transformers(full, name):
    expected = _CASES[name]["prompt_logprobs"]
    assert len(full.prompt) >= min(256, len(expected))
    expected = expected[-len(full.prompt) :]
    np.testing.assert_allclose(full.prompt, expected, rtol=0, atol=_PROMPT_TOLERANCE)


@pytest.mark.parametrize("case_name", ["The capital of France is", "code_and_scripts"])
def test_a_score_gives_prompt_tokens_the_logprobs_of_transformers(engine, case_name):
    case = _CASES[case_name]
    token_ids = case["token_ids"]
    residuals = residuals_of(engine, token_ids[:-1])
    found = logprobs_of(engine, residuals, token_ids[1:])
    np.testing.assert_allclose(found, case["prompt_logprobs"], rtol=0, atol=_PROMPT_TOLERANCE)


def test_decode_draws_the_greedy_tokens_of_transformers(cached):
    num_compared = 0
    for name, case in _CASES.items():
        for step, margin in enumerate(case["greedy_margins"]):
            if margin > _CLEAR_MARGIN:
                drawn, expected = cached[name][step].token_id, case["greedy_token_ids"][step]
                assert drawn == expected, f"{name}, token {step}"
                num_compared += 1
    assert num_compared == 190, "of 8 × 24; the two others have margins below 0.02"


def test_decode_reports_the_alternatives_of_transformers(cached, name):
    case = _CASES[name]
    first, expected = dict(cached[name][0].top), dict(case["next_top5"])
    assert {id_: first[id_] for id_ in expected} == pytest.approx(expected, rel=0, abs=_TOLERANCE)
    margins = [token.top[0][1] - token.top[1][1] for token in cached[name]]
    np.testing.assert_allclose(margins, case["greedy_margins"], rtol=0, atol=_TOLERANCE)


def test_decode_with_the_cache_agrees_with_a_full_forward(full, cached, name):
    for step, token in enumerate(cached[name]):
        expected = full.following[step]
        assert token.logprob == pytest.approx(expected[token.token_id], rel=0, abs=5e-5)
        ids, logprobs = zip(*token.top, strict=True)
        np.testing.assert_allclose(logprobs, expected[list(ids)], rtol=0, atol=1e-3)


def test_company_changes_no_bit(engine):
    """One row alone, then among 1 to 7 others, at every place, beside prompts of other lengths."""
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(100, 200_000, length).tolist() for length in (21, 3, 300, 90, 1, 8, 2, 40)
    ]
    for slot, prompt in enumerate(prompts):
        prefill(engine, slot, prompt)
    drawing = Sampling(temperature=0.9, top_k=0, top_p=0.95, seed=11)
    rows = [
        DecodeRow(slot, len(prompt) - 1, rules_of(prompt, 9, drawing, num_logprobs=20))
        for slot, prompt in enumerate(prompts)
    ]
    (alone,) = one_step(engine, rows[0])
    for num_others in range(1, 8):
        for place in (0, num_others // 2, num_others):
            company = rows[1 : num_others + 1]
            batch = [*company[:place], rows[0], *company[place:]]
            drawn = one_step(engine, *batch)[place]
            assert drawn == alone, f"among {num_others}, at place {place}"
