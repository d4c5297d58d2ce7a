"""Interventions and captures in the worker's loop, on the arithmetic engine.

Its stream is one number wide: at layer −1 the token, at layer 0 the sum so far, token 0 being bos.
"""

import random
import struct
from itertools import accumulate

import msgspec
import pytest

from service.protocol.messages import (
    BeamSearch,
    Capture,
    ContrastiveSearch,
    Failed,
    Finished,
    Intervention,
    Piece,
    Scored,
    ScoredContext,
    ScoredIds,
    ScoredText,
)
from service.worker.admission import Refusal
from service.worker.interventions import TextPlaces, places_between, places_of
from tests.fakes.arithmetic_engine import NOT_FINITE
from tests.test_loop import Worker, generate
from tests.test_worker_scores import ScoreWorker, score


def number(value):
    return struct.pack("<f", value)


def plus(amount, positions, layer=-1):
    return Intervention("add", (layer,), positions, 1.0, number(amount))


def streams(tokens, interventions, places):
    """Both layers, by hand; ``places`` says for each intervention where it acts."""
    embedded, sums = [float(token) for token in tokens], []
    for each, acting in zip(interventions, places, strict=True):
        if -1 in each.layers:
            for place in acting:
                embedded[place] = change(embedded[place], each)
    for place, total in enumerate(accumulate(embedded)):
        for each, acting in zip(interventions, places, strict=True):
            if 0 in each.layers and place in acting:
                total = change(total, each)
        sums.append(total)
    return {-1: embedded, 0: sums}


def change(x, each):
    v = struct.unpack("<f", each.vector)[0] if each.vector else 0.0
    return {"add": x + each.scale * v, "scale": x * each.scale, "zero": 0.0, "set": v}[
        each.operation
    ]


def logprobs(tokens, first, sums):
    return [-1.0 - (tokens[i] - int(sums[i - 1])) % 1000 for i in range(first, len(tokens))]


@pytest.mark.parametrize("positions", ["all", "context", "target", "last", (0, 2), (3,)])
@pytest.mark.parametrize("layer", [-1, 0])
def test_a_score_is_changed_where_it_should_be_and_nowhere_else(positions, layer):
    changes = (plus(7, positions, layer), Intervention("scale", (layer,), positions, 2.0))
    worker = ScoreWorker()
    capture = Capture((0, -1), "all", is_half=False)
    texts = [((0, 1, 2), (3,)), ((0, 1, 2), (4, 9, 30)), ((0, 1, 2), (5,) * 9)]
    targets = tuple(" " + " ".join(map(str, target)) for _, target in texts)
    given = ScoredContext("1 2", targets)
    worker.score(score("a", given, interventions=changes, captures=(capture,)))
    worker.run()
    [found] = worker.found("a")
    for index, (context, target) in enumerate(texts):
        tokens, first = [*context, *target], len(context)
        last = len(tokens) - 1
        words = {"all": range(last + 1), "context": range(first), "last": [last]}
        words["target"] = range(first, last + 1)
        acting = words[positions] if isinstance(positions, str) else positions
        expected = streams(tokens, changes, [acting] * 2)
        assert found.targets[index].logprob == sum(logprobs(tokens, first, expected[0]))
        captured = {
            each.layer: list(struct.unpack(f"<{last + 1}f", each.numbers))
            for each in found.captures
            if each.target_index == index
        }
        assert captured == expected
    assert [(each.target_index, each.layer) for each in found.captures] == [
        (index, layer) for index in range(3) for layer in (0, -1)
    ]


def test_of_ids_the_target_is_where_the_mask_is_one():
    capture = Capture((-1,), "target", is_half=True), Capture((-1,), "context", is_half=True)
    for target_ids in (None, (1, 2, 3, 4)):
        worker = ScoreWorker()
        given = ScoredIds((5, 6, 7, 8), target_ids, (False, True, False, True))
        worker.score(score("a", given, captures=capture))
        worker.run()
        [found] = worker.found("a")
        assert [each.positions for each in found.captures] == [(1, 3), (0, 2)]
        assert struct.unpack("<2e", found.captures[0].numbers) == (6, 8)


def test_what_is_captured_is_read_even_if_no_score_needs_it():
    worker = ScoreWorker()
    given = ScoredIds(tuple(range(1, 21)), None, (False, True, *[False] * 18))
    worker.score(score("a", given, captures=(Capture((0,), "last", is_half=False),)))
    worker.run()
    [found] = worker.found("a")
    [captured] = found.captures
    assert captured.positions == (19,)
    assert struct.unpack("<f", captured.numbers) == (sum(range(1, 21)),)


def test_random_requests_together_find_what_each_finds_alone():
    draw = random.Random(6)

    def positions(most):
        return draw.choice(["all", "context", "target", "last", (draw.randrange(most),)])

    def change_of(most):
        operation = draw.choice(["add", "scale", "zero", "set"])
        vector = number(draw.randrange(99)) if operation in ("add", "set") else b""
        scale = float(draw.randrange(4)) if operation in ("add", "scale") else 1.0
        return Intervention(operation, (draw.choice([-1, 0]),), positions(most), scale, vector)

    commands = []
    for index in range(30):
        ids = tuple(draw.randrange(1, 800) for _ in range(draw.randint(2, 30)))
        targets = tuple(f" {draw.randrange(800)} 7" for _ in range(draw.randint(1, 5)))
        inputs = (ScoredIds(ids, None, None), ScoredContext("1 2 3 4 5", targets))
        changes = tuple(change_of(2) for _ in range(draw.randint(0, 4)))
        captures = tuple(
            Capture((draw.choice([-1, 0]),), positions(2), draw.random() < 0.5)
            for _ in range(draw.randint(0, 2))
        )
        commands.append(score(f"s{index}", *inputs, interventions=changes, captures=captures))
    alone = {}
    for command in commands:
        worker = ScoreWorker()
        worker.score(command)
        worker.run()
        [event] = worker.events(command.request_id)
        alone[command.request_id] = event.inputs if isinstance(event, Scored) else event.code
    together = ScoreWorker()
    for command in commands:
        together.score(command)
    together.run()
    for request_id, expected in alone.items():
        [event] = together.events(request_id)
        assert (event.inputs if isinstance(event, Scored) else event.code) == expected


def tokens_of(worker, request_id):
    return [
        token
        for event in worker.events(request_id)
        if isinstance(event, Piece)
        for token in event.token_ids
    ]


def steered(request_id, prompt, *changes, **others):
    search = others.pop("search", None)
    command = generate(request_id, prompt, **others)
    return msgspec.structs.replace(command, interventions=changes, search=search)


def continued(prompt, changes, num_tokens):
    """By hand; where each acts is told with it."""
    tokens = [*prompt]
    for _ in range(num_tokens):
        newest, end = len(tokens) - 1, len(prompt)
        acting = []
        for each in changes:
            words = {
                "all": range(newest + 1),
                "context": range(min(end, newest + 1)),
                "target": range(end, newest + 1),
                # The newest one at each step; what it left there stays.
                "last": range(end - 1, newest + 1),
            }
            places = words[each.positions] if isinstance(each.positions, str) else each.positions
            acting.append(places)
        tokens.append(int(streams(tokens, changes, acting)[0][-1]) % 1000)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("positions", ["all", "context", "target", "last", (0, 3), (5,)])
@pytest.mark.parametrize("layer", [-1, 0])
def test_a_generation_is_steered_where_it_should_be(positions, layer):
    changes = (plus(7, positions, layer),)
    prompt = (1, 2, 3, 4, 5, 6)
    worker = Worker(num_steps=2)
    worker.submit(steered("a", prompt, *changes, max_tokens=6, n=3))
    worker.submit(generate("b", prompt, max_tokens=6))
    worker.run()
    expected = continued(prompt, changes, 6)
    pieces = [event for event in worker.events("a") if isinstance(event, Piece)]
    for output in range(3):
        assert [t for p in pieces if p.output == output for t in p.token_ids] == expected
    assert tokens_of(worker, "b") == continued(prompt, (), 6)


@pytest.mark.parametrize("search", [BeamSearch(2), ContrastiveSearch(2, 0.0)])
def test_a_search_is_steered_as_a_greedy_row_is(search):
    # With alpha 0, or one step ahead, a search takes what is likeliest.
    changes = (plus(7, "all"), plus(3, "last", 0), plus(5, "context", 0))
    prompt = (1, 2, 3, 4, 5, 6)
    num_tokens = 1 if isinstance(search, BeamSearch) else 4
    worker = Worker()
    worker.submit(steered("a", prompt, *changes, max_tokens=num_tokens, search=search))
    worker.run()
    assert tokens_of(worker, "a") == continued(prompt, changes, num_tokens)


def test_kept_blocks_serve_those_who_change_the_prompt_in_the_same_way_only():
    prompt = tuple(range(1, 14))
    worker = Worker(prefix_cache_bytes=1 << 20)

    def cached(request_id, *changes):
        worker.submit(steered(request_id, prompt, *changes, max_tokens=3))
        worker.run()
        [end] = [event for event in worker.events(request_id) if isinstance(event, Finished)]
        assert tokens_of(worker, request_id) == continued(prompt, changes, 3)
        return end.num_cached_tokens

    assert cached("a") == 0
    assert cached("b", plus(7, "all")) == 0
    assert cached("c", plus(7, "all")) == 12
    assert cached("d", plus(8, "all")) == 0
    assert cached("e", plus(7, (2,))) == 0
    # These leave the prompt as it is.
    assert cached("f", plus(7, "last")) == 12
    assert cached("g", plus(7, "target")) == 12
    assert cached("h", plus(7, (12,))) == 12


@pytest.mark.parametrize(
    ("wrong", "pointer"),
    [
        ({"interventions": (plus(1, "all", 1),)}, "/interventions/0/layers/0"),
        (
            {"interventions": (plus(1, "all"), Intervention("zero", (0, -2), "all"))},
            "/interventions/1/layers/1",
        ),
        (
            {"interventions": (Intervention("set", (0,), "all", 1.0, number(1) * 2),)},
            "/interventions/0/vector",
        ),
        ({"interventions": (plus(1, (0, 3)),)}, "/interventions/0/positions/1"),
    ],
)
def test_what_the_model_or_the_text_does_not_have_is_refused(wrong, pointer):
    worker = ScoreWorker()
    for admit in (
        lambda: worker.score(score("a", ScoredText("1 2"), **wrong)),
        lambda: worker.submit(steered("b", (1, 2, 3), *wrong["interventions"])),
    ):
        with pytest.raises(Refusal) as refused:
            admit()
        assert (refused.value.failed.code, refused.value.failed.pointer) == (
            "invalid_field",
            pointer,
        )
    assert worker.admission.num_waiting == worker.admission.num_scores_waiting == 0


@pytest.mark.parametrize(
    ("captures", "pointer"),
    [
        ((Capture((0, 1), "all", is_half=True),), "/capture/0/layers/1"),
        (
            (Capture((0,), "all", is_half=True), Capture((0,), (9,), is_half=True)),
            "/capture/1/positions/0",
        ),
    ],
)
def test_a_capture_of_what_is_not_there_is_refused(captures, pointer):
    with pytest.raises(Refusal) as refused:
        ScoreWorker().score(score("a", ScoredText("1 2"), captures=captures))
    assert refused.value.failed.pointer == pointer


def test_more_than_an_answer_may_hold_is_refused_before_anything_runs():
    worker = ScoreWorker(max_tokens=10**9)
    # 64 texts, each with 32 places of 4 bytes at 2 layers, 512 times: 8 MiB.
    targets = (" " + "3 " * 30,) * 64
    inputs = (ScoredContext("1", targets),) * 64
    capture = Capture((-1, 0), "all", is_half=False)
    assert 64 * 64 * 32 * 2 * 4 == 2**20
    worker.score(score("a", *inputs, captures=(capture,) * 8))
    last = Capture((0,), (0,), is_half=True)
    with pytest.raises(Refusal) as refused:
        worker.score(score("b", *inputs, captures=(*(capture,) * 8, last)))
    assert refused.value.failed.pointer == "/capture"


def test_places_are_cut_to_a_chunk():
    text = TextPlaces(10, range(6, 10))
    assert places_of("context", text, "") == range(6)
    assert places_of((7, 2), text, "") == (2, 7)
    assert places_of("last", text, "") == range(9, 10)
    assert places_between(range(6, 10), 4, 8) == (2, 3)
    assert places_between(range(6, 10), 0, 4) == ()
    assert places_between((2, 7), 4, 8) == (3,)
    assert TextPlaces(4, (1, 3)).context == (0, 2)


def test_a_failed_request_is_a_failed_event():
    worker = ScoreWorker()
    worker.score(score("a", ScoredIds((1, NOT_FINITE, 5), None, None)))
    worker.run()
    [event] = worker.events("a")
    assert isinstance(event, Failed)
    assert event.code == "numerical"
