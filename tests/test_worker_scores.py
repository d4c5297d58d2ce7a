"""Scores in the worker's loop, on the arithmetic engine. Texts are numbers, and token 0 is bos.

After tokens whose sum goes to s, token s + k has the log-probability −1 − k.
"""

import itertools
import math
import time

import pytest
from hypothesis import given, settings, strategies as st

from service.protocol.messages import (
    Failed,
    Piece,
    Score,
    Scored,
    ScoredContext,
    ScoredIds,
    ScoredText,
)
from service.worker.admission import Refusal
from service.worker.score_inputs import MAX_TOLD_TOKENS
from tests.fakes.arithmetic_engine import NOT_FINITE
from tests.fakes.arithmetic_scores import HEAD_PLACES, HEAD_PLACES_OF_STEP
from tests.test_loop import NUM_SLOTS, Worker, generate


class ScoreWorker(Worker):
    """Also takes requests of scores."""

    def score(self, command):
        request, accepted = self.admission.admit_score(command)
        self.arrivals.put(request)
        self.open[command.request_id] = request
        return accepted

    def turn(self):
        before = len(self.frames)
        super().turn()
        for event in [event for frame in self.frames[before:] for event in frame]:
            if isinstance(event, Scored):
                del self.open[event.request_id]

    def found(self, request_id):
        [event] = self.events(request_id)
        assert isinstance(event, Scored), event
        return event.inputs

    def logprobs(self, request_id):
        return [[target.logprob for target in each.targets] for each in self.found(request_id)]


def score(request_id, *inputs, deadline=math.inf, tells_tokens=False, num_top=0, **others):
    return Score(request_id, "default", deadline, None, inputs, tells_tokens, num_top, **others)


def logprob(before, token_id):
    return -1.0 - (token_id - sum(before)) % 1000


def test_a_text_is_scored_by_hand():
    worker = ScoreWorker()
    accepted = worker.score(score("a", ScoredText("1 1 2 9")))
    worker.run()
    assert accepted.num_prompt_tokens == (5,)
    [[target]] = [each.targets for each in worker.found("a")]
    # After bos comes 0, so 1 is one off; then 1 and 2 as they should, and 9 where 4 was due.
    assert target.logprob == -2 - 1 - 1 - 6
    assert (target.num_tokens, target.num_bytes, target.is_greedy) == (4, 7, False)
    assert target.tokens == ()


def test_each_token_is_told_with_its_rank_and_its_alternatives():
    worker = ScoreWorker()
    worker.score(score("a", ScoredContext("1 2", (" 4",)), tells_tokens=True, num_top=2))
    worker.run()
    [[target]] = [each.targets for each in worker.found("a")]
    [token] = target.tokens
    assert (token.token.id, token.token.logprob, token.token.token) == (4, -2.0, " 4")
    assert (token.position, token.rank) == (3, 1)
    assert [(each.id, each.logprob) for each in token.top] == [(3, -1.0), (4, -2.0)]


def test_several_targets_are_scored_as_each_alone_and_their_context_is_read_once():
    context, targets = "1 2 3 4 5", (" 15 30", " 15 31 7 8 2", " 6", " 15")
    worker = ScoreWorker()
    worker.score(score("a", ScoredContext(context, targets)))
    read = []
    engine_read = worker.engine.read
    worker.engine.read = lambda chunks: read.extend(chunks) or engine_read(chunks)
    worker.run()
    expected = []
    for target in targets:
        before, total = [0, 1, 2, 3, 4, 5], 0.0
        for token_id in map(int, target.split()):
            total += logprob(before, token_id)
            before.append(token_id)
        expected.append(total)
    assert worker.logprobs("a") == [expected]
    assert worker.found("a")[0].targets[0].is_greedy
    assert sum(len(chunk.token_ids) for chunk in read) == 6 + 1 + 4 + 0 + 0


def test_a_target_that_changes_the_context_is_read_as_it_is_written():
    worker = ScoreWorker()
    # Joined to "1 23 5": the context is 1 23 then, and 5 is what is scored.
    worker.score(score("a", ScoredContext("1 2", ("3 5", " 3"))))
    worker.run()
    assert worker.logprobs("a") == [[logprob([1, 23], 5), logprob([1, 2], 3)]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (ScoredIds((1, 1, 2), None, None), [([1], 1), ([1, 1], 2)]),
        (ScoredIds((1, 1, 7), None, (False, False, True)), [([1, 1], 7)]),
        (ScoredIds((1, 1, 2), (5, 6, 7), None), [([1], 5), ([1, 1], 6), ([1, 1, 2], 7)]),
        (ScoredIds((1, 1, 2), (5, 6, 7), (True, False, True)), [([1], 5), ([1, 1, 2], 7)]),
    ],
)
def test_ids_are_scored_where_their_mask_says(given, expected):
    worker = ScoreWorker()
    worker.score(score("a", given, tells_tokens=True))
    worker.run()
    [[target]] = [each.targets for each in worker.found("a")]
    found = [(each.position, each.token.id, each.token.logprob) for each in target.tokens]
    assert found == [(len(before), id_, logprob(before, id_)) for before, id_ in expected]


def test_what_was_generated_has_the_log_probabilities_that_came_with_it():
    worker = ScoreWorker()
    worker.score(score("a", ScoredIds((0, 1, 2, 3, 6, 12, 24), None, (False,) * 4 + (True,) * 3)))
    worker.run()
    [[target]] = [each.targets for each in worker.found("a")]
    assert target.is_greedy
    assert target.logprob == -3.0, "each is drawn with −1"


def test_many_requests_are_scored_as_each_alone_beside_others_that_generate():
    inputs = {
        f"s{number}": (
            ScoredText(" ".join(str(number + k) for k in range(1 + 3 * number % 11))),
            ScoredContext("1 " * number, (f" {number}", " 5 6", " 7 8 9 10 11 12")),
        )
        for number in range(20)
    }
    alone = {}
    for name, each in inputs.items():
        worker = ScoreWorker()
        worker.score(score(name, *each))
        worker.run()
        alone[name] = worker.logprobs(name)
    worker = ScoreWorker()
    for number, (name, each) in enumerate(inputs.items()):
        worker.score(score(name, *each))
        worker.submit(generate(f"g{number}", (number, 2, 3, 4, 5, 6), max_tokens=5))
        worker.turn()
    worker.run()
    assert {name: worker.logprobs(name) for name in inputs} == alone
    for number in range(20):
        total = number + 20
        assert worker.tokens(f"g{number}") == [total * 2**k % 1000 for k in range(5)]


NUMBERS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=5)), max_size=6))
def test_every_target_of_any_request_is_scored_by_hand(contexts):
    worker = ScoreWorker()
    for number, (context, targets) in enumerate(contexts):
        texts = tuple("".join(f" {id_}" for id_ in target) for target in targets)
        given = ScoredContext(" ".join(map(str, context)), texts)
        worker.score(score(f"s{number}", given, ScoredText(given.context + texts[0])))
    worker.run()
    for number, (context, targets) in enumerate(contexts):
        sums = [
            sum(logprob([*context, *target[:end]], target[end]) for end in range(len(target)))
            for target in targets
        ]
        before = sum(logprob(context[:end], context[end]) for end in range(len(context)))
        assert worker.logprobs(f"s{number}") == [sums, [before + sums[0]]]


def test_parts_of_scores_and_steps_take_turns():
    worker = ScoreWorker()
    worker.submit(generate("a", (1,), max_tokens=60))
    worker.turn()
    worker.score(score("s", ScoredText("1 " * 15)))
    kinds = []
    for name, kind in (("decode", "step"), ("read", "part"), ("measure", "part")):
        own = getattr(worker.engine, name)
        setattr(
            worker.engine,
            name,
            lambda *arguments, own=own, kind=kind: kinds.append(kind) or own(*arguments),
        )
    worker.run()
    assert all(pair != ("part", "part") for pair in itertools.pairwise(kinds))
    # Four chunks, and the head for eight places and for seven.
    assert kinds.count("part") == 4 + 2


@pytest.mark.parametrize("is_accompanied", [False, True], ids=["alone", "beside"])
def test_beside_a_stream_the_head_takes_few_places_at_once(is_accompanied):
    worker = ScoreWorker()
    if is_accompanied:
        worker.submit(generate("a", (1,), max_tokens=60))
        worker.turn()
    worker.score(score("s", ScoredText("1 " * 30)))
    counts = []
    measure = worker.engine.measure
    worker.engine.measure = lambda places: counts.append(len(places)) or measure(places)
    worker.run()
    assert sum(counts) == 30
    assert max(counts) == (HEAD_PLACES_OF_STEP if is_accompanied else HEAD_PLACES)
    [[target]] = [each.targets for each in worker.found("s")]
    # Of ones behind 0, 1, 2, … in all.
    assert target.logprob == sum(logprob([1] * number, 1) for number in range(30))


def test_places_wait_for_the_rest_of_their_request():
    worker = ScoreWorker()
    worker.score(score("a", *[ScoredContext("1 1 1", (" 3",))] * 10))
    assert parts_of(worker) == ["read"] * 10 + [10]


def test_a_request_that_was_read_waits_for_two_chunks_of_others_at_the_head():
    worker = ScoreWorker()
    worker.score(score("short", ScoredContext("2 2 2", (" 6",))))
    worker.score(score("long", *[ScoredContext("1 1 1", (" 3",))] * 10))
    assert parts_of(worker) == ["read"] * 3 + [3] + ["read"] * 8 + [8]


def parts_of(worker):
    """Runs it: "read" for each chunk, and how many places each call of the head had."""
    parts = []
    read, measure = worker.engine.read, worker.engine.measure
    worker.engine.read = lambda chunks: parts.append("read") or read(chunks)
    worker.engine.measure = lambda places: parts.append(len(places)) or measure(places)
    worker.run()
    return parts


def test_a_score_that_is_cancelled_ends_and_the_next_one_is_not_disturbed():
    worker = ScoreWorker()
    worker.score(score("a", ScoredText("1 " * 30)))
    worker.score(score("b", ScoredText("1 1 2")))
    worker.turn()
    worker.cancel("a")
    worker.run()
    [ended] = worker.events("a")
    assert isinstance(ended, Failed)
    assert ended.code == "request_cancelled"
    assert worker.logprobs("b") == [[-2 - 1 - 1]]
    assert worker.admission.num_scores_waiting == worker.admission.num_waiting_tokens == 0


def test_a_score_whose_time_has_passed_says_so():
    worker = ScoreWorker()
    worker.score(score("a", ScoredText("1 1"), deadline=time.monotonic() - 1))
    worker.run()
    [ended] = worker.events("a")
    assert isinstance(ended, Failed)
    assert ended.code == "deadline_exceeded"


def test_a_score_that_is_not_finite_fails_alone():
    worker = ScoreWorker()
    worker.score(score("bad", ScoredIds((1, NOT_FINITE, 2), None, None)))
    worker.score(score("good", ScoredText("1 1")))
    worker.run()
    [ended] = worker.events("bad")
    assert isinstance(ended, Failed)
    assert ended.code == "numerical"
    assert worker.logprobs("good") == [[-2 - 1]]


def test_scores_count_as_waiting_until_they_are_read_and_as_running_then():
    worker = ScoreWorker(max_requests=2)
    worker.submit(generate("g", (1,), n=NUM_SLOTS, max_tokens=3))
    worker.score(score("a", ScoredText("1 " * 9)))
    assert (worker.admission.num_waiting, worker.admission.num_scores_waiting) == (1, 1)
    with pytest.raises(Refusal) as refused:
        worker.score(score("b", ScoredText("1")))
    assert refused.value.failed.code == "queue_full"
    running = 0
    while worker.open:
        worker.turn()
        running = max(running, worker.status.num_scoring)
    assert running == 1
    assert (worker.admission.num_waiting, worker.admission.num_scores_waiting) == (0, 0)
    assert worker.status.work.score == 9


@pytest.mark.parametrize(
    ("given", "code", "pointer"),
    [
        (ScoredText(""), "invalid_field", "/inputs/1/text"),
        (ScoredText("1 " * 64), "context_length_exceeded", "/inputs/1/text"),
        (ScoredContext("1 " * 63, (" 1",)), "context_length_exceeded", "/inputs/1/context"),
        (ScoredContext("1", (" 2", "3")), "invalid_field", "/inputs/1/targets/1"),
        (ScoredContext("1", (" 2", " 3" * 63)), "context_length_exceeded", "/inputs/1/targets/1"),
        (ScoredIds((1, 1000), None, None), "invalid_field", "/inputs/1/token_ids/1"),
        (ScoredIds((1, 2), (1, -1), None), "invalid_field", "/inputs/1/target_ids/1"),
        (ScoredIds((1,) * 65, None, None), "context_length_exceeded", "/inputs/1/token_ids"),
        (ScoredContext("1" * 40_000, (" 2",) * 64), "invalid_field", "/inputs"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_the_place_before_anything_runs(given, code, pointer):
    worker = ScoreWorker()
    with pytest.raises(Refusal) as refused:
        worker.score(score("a", ScoredText("1"), given))
    assert (refused.value.failed.code, refused.value.failed.pointer) == (code, pointer)
    assert worker.admission.num_scores_waiting == 0


def test_an_answer_that_would_not_fit_is_refused():
    worker = ScoreWorker(max_tokens=10**6)
    inputs = [ScoredContext("1", (" 2 3",) * 64)] * 64
    most = MAX_TOLD_TOKENS // (64 * 64 * 2)
    with pytest.raises(Refusal) as refused:
        worker.score(score("a", *inputs, tells_tokens=True, num_top=most))
    assert refused.value.failed.pointer == "/return"
    worker.score(score("b", *inputs, tells_tokens=True, num_top=most - 1))


def test_a_request_of_more_than_the_queue_holds_is_refused_for_good():
    worker = ScoreWorker(max_tokens=20)
    with pytest.raises(Refusal) as refused:
        worker.score(score("a", ScoredText("1 " * 22)))
    assert refused.value.failed.code == "invalid_field"


def test_the_first_token_of_a_stream_does_not_wait_for_all_scores():
    worker = ScoreWorker()
    for number in range(30):
        worker.score(score(f"s{number}", ScoredText("1 " * 40)))
    worker.turn()
    worker.submit(generate("g", (1,), max_tokens=3))
    for _ in range(8):
        worker.turn()
    assert [type(event) for event in worker.events("g")][:3] == [Piece] * 3
    assert len(worker.open) == 30
