"""Attributions in the worker's loop, on the arithmetic engine (`tests.fakes`): each token up to the
place that is asked about gets its own id and the layer, once for each such place behind it.
"""

import itertools
import math
import struct
import time

import pytest

from model import attribution_questions
from service.api import score_schemas
from service.protocol.messages import Attribute, Failed, ScoredContext, ScoredIds, ScoredText
from service.worker import attribution_jobs
from service.worker.admission import Refusal
from tests.fakes.arithmetic_engine import NOT_FINITE, RAISE
from tests.test_loop import generate
from tests.test_worker_scores import ScoreWorker, score


def attribute(layer=-1, target=0, num_steps=0, reduction="dot_input"):
    return Attribute(layer, target, num_steps, reduction)


def told(worker, request_id):
    """Id and score of each token, for each input."""
    return [
        [(each.id, each.score) for each in found.attribution.tokens]
        for found in worker.found(request_id)
    ]


def test_a_text_is_attributed_and_scored_in_one_request():
    worker = ScoreWorker()
    worker.score(score("a", ScoredText("1 1 2 9"), attribution=attribute(layer=0)))
    worker.run()
    assert worker.logprobs("a") == [[-2 - 1 - 1 - 6]]
    # Asked behind bos, 1, 1 and 2; the last token has nothing behind it.
    times = [4, 3, 2, 1, 0]
    expected = [id_ * n for id_, n in zip([0, 1, 1, 2, 9], times, strict=True)]
    assert told(worker, "a") == [list(zip([0, 1, 1, 2, 9], expected, strict=True))]
    assert worker.found("a")[0].attribution.completeness_error is None


def test_one_target_of_several_is_attributed_with_its_own_tokens():
    worker = ScoreWorker()
    given = ScoredContext("1 2", (" 3", " 5 8"))
    worker.score(score("a", given, attribution=attribute(target=1)))
    worker.run()
    assert told(worker, "a") == [[(0, 2 * -1), (1, 0), (2, 2 * (2 - 1)), (5, 5 - 1), (8, 0)]]


def test_the_loss_is_the_negative_sum_over_targets_for_the_tokens_that_they_share():
    given = ScoredContext("1 2", (" 3 4", " 5 8", " 7"))
    worker = ScoreWorker()
    for target in (0, 1, 2):
        worker.score(score(f"t{target}", given, attribution=attribute(target=target)))
    worker.score(score("loss", given, attribution=attribute(target=None)))
    worker.run()
    singles = [told(worker, f"t{target}")[0] for target in (0, 1, 2)]
    expected = [
        (id_, -sum(single[place][1] for single in singles))
        for place, (id_, _) in enumerate(singles[0][:3])
    ]
    assert told(worker, "loss") == [expected]


def test_a_target_that_changes_the_context_leaves_fewer_tokens_to_share():
    worker = ScoreWorker()
    # "1 2" and "3 5" are 1 23 5.
    given = ScoredContext("1 2", ("3 5", " 3"))
    worker.score(score("a", given, attribution=attribute(target=None)))
    worker.run()
    assert [id_ for id_, _ in told(worker, "a")[0]] == [0, 1]


def test_all_numbers_come_as_a_tensor_with_the_error_of_integrated_gradients():
    worker = ScoreWorker()
    given = ScoredIds((1, 2), (7, 8), (False, True))
    asked = attribute(layer=0, num_steps=4, reduction="none")
    worker.score(score("a", given, attribution=asked))
    worker.run()
    [found] = worker.found("a")
    assert (found.attribution.num_tokens, found.attribution.tokens) == (2, ())
    assert struct.unpack("<2f", found.attribution.tensor) == (1, 2)
    assert found.attribution.completeness_error == 1 / 4


def test_attributions_take_turns_with_scores_and_with_steps():
    worker = ScoreWorker(context_tokens=1024)
    worker.submit(generate("g", (1,), max_tokens=60))
    worker.turn()
    long = score("long", ScoredIds((3,) * 60, None, None), attribution=attribute(num_steps=64))
    worker.score(long)
    kinds = []
    for owner, name, kind in (
        (worker.engine, "decode", "step"),
        (worker.engine, "read", "part"),
        (worker.engine, "measure", "part"),
        (worker.loop._scores._attributions, "step", "part"),
    ):
        own = getattr(owner, name)
        setattr(
            owner,
            name,
            lambda *arguments, own=own, kind=kind: kinds.append(kind) or own(*arguments),
        )
    for number in range(6):
        worker.score(score(f"s{number}", ScoredText("1 1")))
    while len(worker.open) > 2:
        worker.turn()
    assert "long" in worker.open, "short scores end before a long attribution"
    worker.run()
    beside_steps = kinds[: len(kinds) - kinds[::-1].index("step")]
    assert beside_steps.count("step") > 50
    assert all(pair != ("part", "part") for pair in itertools.pairwise(beside_steps))
    assert worker.tokens("g")[:3] == [1, 2, 4]
    assert worker.status.work.score == 12 + 59 + 59 * 64


def test_a_short_attribution_need_not_wait_for_a_long_one():
    worker = ScoreWorker()
    long = score("long", ScoredIds((3,) * 60, None, None), attribution=attribute(num_steps=64))
    worker.score(long)
    for _ in range(20):
        worker.turn()
    worker.score(score("short", ScoredText("1 1"), attribution=attribute()))
    while "short" in worker.open:
        worker.turn()
    assert "long" in worker.open
    worker.run()
    assert len(told(worker, "long")[0]) == 60


@pytest.mark.parametrize("num_turns", [0, 1, 5, 20])
def test_an_attribution_that_is_cancelled_ends_at_once_and_gives_everything_back(num_turns):
    worker = ScoreWorker()
    asked = attribute(num_steps=64)
    worker.score(score("a", ScoredIds((3,) * 60, None, None), attribution=asked))
    worker.score(score("b", ScoredText("1 1"), attribution=attribute()))
    for _ in range(num_turns):
        worker.turn()
    worker.cancel("a")
    worker.turn()
    [ended] = worker.events("a")
    assert isinstance(ended, Failed)
    assert ended.code == "request_cancelled"
    worker.run()
    assert told(worker, "b") == [[(0, -2), (1, 0), (1, 0)]]
    assert worker.admission.num_scores_waiting == worker.admission.num_waiting_tokens == 0


def test_an_attribution_whose_time_passes_says_so():
    worker = ScoreWorker()
    deadline = time.monotonic() + 0.05
    asked = attribute(num_steps=64)
    worker.score(score("a", ScoredIds((3,) * 60, None, None), attribution=asked, deadline=deadline))
    worker.turn()
    time.sleep(0.05)
    worker.run()
    [ended] = worker.events("a")
    assert (ended.code, worker.status.num_running) == ("deadline_exceeded", 0)


def test_an_attribution_that_is_not_finite_fails_alone():
    worker = ScoreWorker()
    # Nothing of the score is not finite: this token is the last, and only the text has it.
    bad = ScoredIds((1, 2, NOT_FINITE), None, (False, True, False))
    worker.score(score("bad", bad, attribution=attribute()))
    worker.score(score("good", ScoredText("1 1"), attribution=attribute()))
    worker.run()
    [ended] = worker.events("bad")
    assert (type(ended), ended.code) == (Failed, "numerical")
    assert len(told(worker, "good")[0]) == 3


CONTEXT = ScoredContext("1", (" 2", " 3"))


@pytest.mark.parametrize(
    ("inputs", "asked", "pointer"),
    [
        ([CONTEXT], attribute(layer=1), "/attribution/layer"),
        ([CONTEXT], attribute(target=2), "/attribution/target"),
        ([CONTEXT, ScoredText("1")], attribute(target=1), "/attribution/target"),
        ([ScoredIds((1,) * 513, None, None)], attribute(), "/inputs/0/token_ids"),
        ([CONTEXT, ScoredText("1 " * 512)], attribute(), "/inputs/1/text"),
        ([ScoredContext("1", (" 1", " 1" * 511))], attribute(target=1), "/inputs/0/targets/1"),
        ([ScoredIds((1,) * 512, None, None)] * 2, attribute(num_steps=64), "/attribution"),
        (
            [CONTEXT, ScoredIds((1,) * 300, None, None)],
            attribute(reduction="none"),
            "/attribution/reduce",
        ),
    ],
)
def test_what_cannot_be_attributed_is_refused_with_its_place(monkeypatch, inputs, asked, pointer):
    monkeypatch.setattr(attribution_jobs, "MAX_TENSOR_BYTES", 1000)
    worker = ScoreWorker(max_tokens=10**6, context_tokens=1024)
    with pytest.raises(Refusal) as refused:
        worker.score(score("a", *inputs, attribution=asked))
    assert (refused.value.failed.code, refused.value.failed.pointer) == ("invalid_field", pointer)
    assert worker.admission.num_scores_waiting == 0


def test_a_refusal_for_length_has_both_numbers():
    worker = ScoreWorker(context_tokens=1024)
    given = ScoredIds((1,) * 600, None, None)
    with pytest.raises(Refusal) as refused:
        worker.score(score("a", given, attribution=attribute()))
    assert "600 tokens" in refused.value.failed.detail
    assert "at most 512" in refused.value.failed.detail


def test_a_long_target_that_is_not_attributed_is_no_obstacle():
    worker = ScoreWorker(context_tokens=1024)
    given = ScoredContext("1", (" 1", " 1" * 600))
    worker.score(score("a", given, attribution=attribute(target=0)))
    worker.run()
    assert told(worker, "a") == [[(0, -1), (1, 0), (1, 0)]]


def test_an_engine_that_fails_in_an_attribution_fails_as_in_a_step():
    worker = ScoreWorker()
    bad = ScoredIds((1, 2, RAISE), None, (False, True, False))
    worker.score(score("a", bad, attribution=attribute()))
    with pytest.raises(RuntimeError, match="the step failed"):
        worker.run()


def test_limits_are_the_same_on_both_sides_of_the_wall():
    of_api = score_schemas
    assert of_api.MAX_ATTRIBUTION_TOKENS == attribution_questions.MAX_ATTRIBUTION_TOKENS
    assert of_api.MAX_ATTRIBUTION_STEPS == attribution_questions.MAX_ATTRIBUTION_STEPS
    assert of_api.MAX_ATTRIBUTION_WORK == attribution_jobs.MAX_ATTRIBUTION_WORK
    assert of_api.MAX_ATTRIBUTION_BYTES == attribution_jobs.MAX_TENSOR_BYTES
    assert math.isclose(of_api.MAX_ATTRIBUTION_WORK, 512 * 64)
