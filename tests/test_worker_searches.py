"""Beam and contrastive search from admission to the last event, on the arithmetic engine.

What is found is compared with a few lines of lists that know of no slots, no steps and no turns.
"""

import math
from collections.abc import Sequence

import msgspec
import pytest

from service.protocol.messages import (
    BeamSearch,
    ContrastiveSearch,
    Failed,
    Finished,
    Generate,
    OutputEnd,
    Piece,
)
from service.worker.admission import Refusal
from tests.fakes.arithmetic_engine import EOS_ID, NOT_FINITE
from tests.fakes.arithmetic_search import chosen_place, likely_tokens
from tests.test_loop import NUM_SLOTS, Worker, generate


def searching(
    request_id: str,
    search: BeamSearch | ContrastiveSearch,
    *prompts: tuple[int, ...],
    num_logprobs: int | None = None,
    deadline: float = math.inf,
    n: int = 1,
    max_tokens: int = 4,
    echo: bool = False,
    **stop: object,
) -> Generate:
    command = generate(request_id, *prompts, n=n, max_tokens=max_tokens)
    return msgspec.structs.replace(
        command,
        search=search,
        num_logprobs=num_logprobs,
        deadline=deadline,
        echo=echo,
        stop=msgspec.structs.replace(command.stop, **stop),
    )


def best_beams(
    prompt: Sequence[int],
    num_beams: int,
    max_tokens: int,
    stop_ids: Sequence[int] = (EOS_ID,),
    min_tokens: int = 0,
) -> list[tuple[float, list[int]]]:
    """Log-probability and tokens of each beam, best first."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for place in range(max_tokens):
        banned = stop_ids if place < min_tokens else ()
        found = []
        for logprob, ids in beams:
            if ids and ids[-1] in stop_ids:
                found.append((logprob, ids))
                continue
            likely = likely_tokens([*prompt, *ids], banned)
            found += [(logprob + more, [*ids, id_]) for id_, more in likely]
        beams = sorted(found, key=lambda beam: -beam[0])[:num_beams]
    return beams


def chosen_tokens(prompt: Sequence[int], k: int, alpha: float, num_tokens: int) -> list[int]:
    ids: list[int] = []
    for place in range(num_tokens):
        likely = likely_tokens([*prompt, *ids])[:k]
        ids.append(likely[chosen_place(len(prompt) + place, k, alpha)][0])
    return ids


PROMPT = (1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize("prompt", [(5,), (1, 2, 3, 4), PROMPT])
def test_beams_are_those_that_lists_find(num_beams, prompt):
    worker = Worker()
    worker.submit(searching("a", BeamSearch(num_beams), prompt, n=num_beams, max_tokens=6))
    worker.run()
    expected = [ids for _, ids in best_beams(prompt, num_beams, 6)]
    assert [worker.tokens("a", output) for output in range(num_beams)] == expected
    assert worker.ends("a") == (OutputEnd("length", None, 6),) * num_beams


def test_the_likeliest_beam_alone_is_returned_unless_more_are_asked_for():
    worker = Worker()
    worker.submit(searching("a", BeamSearch(4), PROMPT))
    worker.submit(searching("b", BeamSearch(4), PROMPT, n=2))
    worker.run()
    (_, first), (_, second), *_ = best_beams(PROMPT, 4, 4)
    assert worker.tokens("a") == worker.tokens("b", 0) == first
    assert worker.tokens("b", 1) == second
    assert len(worker.ends("a")) == 1
    assert len(worker.ends("b")) == 2


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("prompt", [(5,), PROMPT])
def test_contrastive_search_chooses_what_lists_choose(alpha, prompt):
    worker = Worker()
    worker.submit(searching("a", ContrastiveSearch(3, alpha), prompt, max_tokens=6))
    worker.run()
    assert worker.tokens("a") == chosen_tokens(prompt, 3, alpha, 6)
    assert worker.ends("a") == (OutputEnd("length", None, 6),)
    assert worker.engine.hidden_slots == set()


@pytest.mark.parametrize("search", [BeamSearch(3), ContrastiveSearch(3, 0.6)])
def test_a_search_sends_one_piece_at_its_end_and_prefills_once(search):
    worker = Worker()
    worker.submit(searching("a", search, PROMPT, max_tokens=5, num_logprobs=2))
    worker.run()
    piece, finished = worker.events("a")
    assert isinstance(piece, Piece)
    assert isinstance(finished, Finished)
    assert len(piece.token_ids) == len(piece.logprobs) == 5
    assert piece.text == "".join(f" {id_}" for id_ in piece.token_ids)
    tokens = list(PROMPT)
    for id_, entry in zip(piece.token_ids, piece.logprobs, strict=True):
        likely = likely_tokens(tokens)
        assert (entry.chosen.id, entry.chosen.logprob) in likely
        assert [(each.id, each.logprob) for each in entry.top] == likely[:2]
        tokens.append(id_)
    assert worker.engine.prefilled == [(0, (1, 2, 3, 4)), (0, (5, 6))]
    assert worker.engine.copied == [(0, [1, 2], 6)]


def test_a_beam_that_ends_is_frozen_and_the_search_goes_on_with_the_others():
    prompt, num_beams = (1, 2, 3), 3
    # What the best beam has in its second place ends it.
    stop_id = best_beams(prompt, num_beams, 2)[0][1][1]
    expected = best_beams(prompt, num_beams, 6, (EOS_ID, stop_id))
    lengths = [len(ids) for _, ids in expected]
    assert min(lengths) == 2
    assert max(lengths) == 6
    worker = Worker()
    worker.submit(searching("a", BeamSearch(3), prompt, n=3, max_tokens=6, token_ids=(stop_id,)))
    worker.run()
    assert [worker.tokens("a", output) for output in range(3)] == [ids for _, ids in expected]
    assert worker.ends("a") == tuple(
        OutputEnd("stop", stop_id, 2) if length == 2 else OutputEnd("length", None, 6)
        for length in lengths
    )


def test_a_search_ends_when_all_of_its_beams_have():
    prompt = (1, 2, 3)
    stop_ids = tuple(id_ for id_, _ in likely_tokens(prompt)[:2])
    worker = Worker()
    worker.submit(searching("a", BeamSearch(2), prompt, max_tokens=50, token_ids=stop_ids))
    worker.run()
    assert worker.tokens("a") == [stop_ids[0]]
    assert worker.ends("a") == (OutputEnd("stop", stop_ids[0], 1),)


def test_stop_ids_stay_out_before_min_tokens():
    prompt = (1, 2, 3)
    stop_id = likely_tokens(prompt)[0][0]
    rules = {"token_ids": (stop_id,), "min_tokens": 2, "max_tokens": 5}
    worker = Worker()
    worker.submit(searching("beam", BeamSearch(2), prompt, **rules))
    worker.submit(searching("contrastive", ContrastiveSearch(2, 0.0), prompt, **rules))
    worker.run()
    assert worker.tokens("beam") == best_beams(prompt, 2, 5, (EOS_ID, stop_id), 2)[0][1]
    first = likely_tokens(prompt, (EOS_ID, stop_id))[0][0]
    assert worker.tokens("contrastive")[0] == first != stop_id


@pytest.mark.parametrize("search", [BeamSearch(2), ContrastiveSearch(2, 0.0)])
def test_a_stop_string_ends_a_search_and_is_cut(search):
    worker = Worker()
    worker.submit(searching("free", search, (1, 2, 3), max_tokens=3))
    worker.run()
    ids = worker.tokens("free")
    worker.submit(searching("a", search, (1, 2, 3), max_tokens=9, strings=(f" {ids[1]}",)))
    worker.run()
    [piece, _] = worker.events("a")
    assert worker.tokens("a") == ids[:2]
    assert piece.text == f" {ids[0]}"
    assert worker.ends("a") == (OutputEnd("stop", f" {ids[1]}", 2),)


def test_echo_puts_the_prompt_before_every_output():
    worker = Worker()
    worker.submit(searching("a", BeamSearch(2), (1, 2, 3), n=2, max_tokens=2, echo=True))
    worker.submit(searching("b", ContrastiveSearch(2, 0.0), (1, 2, 3), max_tokens=2, echo=True))
    worker.run()
    for name, output in (("a", 0), ("a", 1), ("b", 0)):
        [piece] = [
            event
            for event in worker.events(name)
            if isinstance(event, Piece) and event.output == output
        ]
        assert piece.text == " 1 2 3" + "".join(f" {id_}" for id_ in piece.token_ids)


def test_every_prompt_has_a_search_of_its_own():
    worker = Worker()
    prompts = ((1, 2), (3, 4, 5), (6,))
    worker.submit(searching("a", BeamSearch(3), *prompts, n=2))
    worker.run()
    expected = [ids for prompt in prompts for _, ids in best_beams(prompt, 3, 4)[:2]]
    assert [worker.tokens("a", output) for output in range(6)] == expected


def test_searches_and_streams_together_answer_as_alone():
    commands = [
        searching("beam", BeamSearch(2), PROMPT, n=2, max_tokens=9),
        generate("stream", (1, 2), max_tokens=12),
        searching("contrastive", ContrastiveSearch(2, 0.6), (9, 8, 7, 6, 5), max_tokens=7),
        searching("wide", BeamSearch(4), (4, 4), max_tokens=5),
        generate("outputs", (3,) * 9, n=3, max_tokens=6, temperature=1.0, seed=4),
    ]
    together = Worker()
    for command in commands:
        together.submit(command)
    together.run()
    for command in commands:
        alone = Worker()
        alone.submit(command)
        alone.run()
        for output in range(command.num_choices):
            assert together.tokens(command.request_id, output) == alone.tokens(
                command.request_id, output
            )
    assert together.engine.hidden_slots == set()


def test_a_stream_waits_for_one_step_of_a_search_and_a_search_for_one_of_the_stream():
    worker = Worker()
    worker.submit(generate("stream", (1,), max_tokens=9))
    worker.submit(searching("a", BeamSearch(3), (2,), max_tokens=9))
    counts = []
    for _ in range(12):
        worker.turn()
        counts.append(len(worker.tokens("stream")))
    assert counts == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


@pytest.mark.parametrize("search", [BeamSearch(3), ContrastiveSearch(3, 0.6)])
def test_a_cancelled_search_gives_what_it_has_and_frees_all_slots_at_once(search):
    worker = Worker()
    worker.submit(searching("a", search, (1, 2, 3), max_tokens=50))
    for _ in range(6):
        worker.turn()
    worker.cancel("a")
    worker.submit(searching("next", BeamSearch(NUM_SLOTS), (1,), max_tokens=1))
    worker.turn()
    tokens = worker.tokens("a")
    assert 3 <= len(tokens) <= 5
    assert worker.ends("a") == (OutputEnd("cancelled", None, len(tokens)),)
    worker.run()
    assert worker.tokens("next") == best_beams((1,), NUM_SLOTS, 1)[0][1]
    assert worker.engine.hidden_slots == set()


def test_a_search_that_waits_or_prefills_is_cancelled_with_nothing():
    worker = Worker()
    worker.submit(generate("stream", (1,), max_tokens=3))
    worker.submit(searching("waits", BeamSearch(4), PROMPT, n=3))
    worker.turn()
    worker.cancel("waits")
    worker.run()
    assert worker.ends("waits") == (OutputEnd("cancelled", None, 0),) * 3
    worker.submit(searching("prefills", ContrastiveSearch(4, 0.5), PROMPT))
    worker.turn()
    worker.cancel("prefills")
    worker.run()
    assert worker.ends("prefills") == (OutputEnd("cancelled", None, 0),)
    assert worker.engine.hidden_slots == set()


def test_a_deadline_ends_a_search_with_what_it_has_or_with_an_error_if_that_is_nothing():
    worker = Worker()
    late = worker.submit(searching("late", BeamSearch(2), PROMPT, n=2, max_tokens=50))
    never = worker.submit(searching("never", ContrastiveSearch(2, 0.5), PROMPT))
    for _ in range(5):
        worker.turn()
    late.deadline = 0.0
    worker.turn()
    [first, second] = worker.ends("late")
    assert first == second == OutputEnd("timeout", None, len(worker.tokens("late")))
    assert worker.tokens("late")
    worker = Worker()
    never = worker.submit(searching("never", ContrastiveSearch(2, 0.5), PROMPT))
    worker.turn()
    never.deadline = 0.0
    worker.turn()
    [failed] = worker.events("never")
    assert isinstance(failed, Failed)
    assert failed.code == "deadline_exceeded"
    assert worker.engine.hidden_slots == set()


@pytest.mark.parametrize("search", [BeamSearch(2), ContrastiveSearch(2, 0.6)])
def test_a_search_that_is_not_finite_fails_alone_and_frees_its_slots(search):
    worker = Worker()
    worker.submit(generate("stream", (1,), max_tokens=6))
    worker.submit(searching("bad", search, (2, NOT_FINITE, 3), (4, 5)))
    worker.run()
    assert worker.tokens("stream") == [1, 2, 4, 8, 16, 32]
    [failed] = [event for event in worker.events("bad") if isinstance(event, Failed)]
    assert failed.code == "numerical"
    worker.submit(searching("next", BeamSearch(NUM_SLOTS), (1,), max_tokens=1))
    worker.run()
    assert worker.tokens("next")
    assert worker.engine.hidden_slots == set()


@pytest.mark.parametrize(
    ("search", "pointer"), [(BeamSearch(5), "/num_beams"), (ContrastiveSearch(8, 0.5), "/top_k")]
)
def test_a_search_of_more_slots_than_there_are_is_refused(search, pointer):
    with pytest.raises(Refusal) as refused:
        Worker().submit(searching("a", search, (1,)))
    assert refused.value.failed.pointer == pointer
    assert "at most 4, the slots of this service" in refused.value.failed.detail


def test_what_waits_is_counted_once_a_search():
    worker = Worker()
    worker.submit(generate("stream", (1,), max_tokens=9))
    worker.turn()
    worker.submit(searching("a", BeamSearch(4), PROMPT, n=4))
    assert worker.admission.num_waiting_tokens == len(PROMPT)
    worker.run()
    assert worker.admission.num_waiting_tokens == 0


def test_beams_begin_with_a_kept_prefix_and_contrastive_search_has_its_own_hidden_states():
    prompt = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    worker = Worker(prefix_cache_bytes=1000)
    worker.submit(generate("first", prompt))
    worker.run()
    worker.submit(searching("beam", BeamSearch(3), prompt))
    worker.run()
    assert worker.tokens("beam") == best_beams(prompt, 3, 4)[0][1]
    assert worker.events("beam")[-1].num_cached_tokens == 8
    worker.submit(searching("contrastive", ContrastiveSearch(3, 0.6), prompt))
    worker.run()
    assert worker.tokens("contrastive") == chosen_tokens(prompt, 3, 0.6, 4)
    assert worker.events("contrastive")[-1].num_cached_tokens == 0


def test_steps_are_dispatched_one_by_one_beside_a_search_and_together_without():
    worker = Worker(num_steps=8)
    worker.submit(generate("stream", (1,), max_tokens=40))
    worker.submit(searching("a", BeamSearch(3), (2,), max_tokens=5))
    worker.run()
    pieces = [len(event.token_ids) for event in worker.events("stream") if isinstance(event, Piece)]
    assert pieces[:5] == [1] * 5
    assert max(pieces) == 8


def test_a_search_costs_its_tenant_the_tokens_of_all_its_slots():
    worker = Worker()
    stream = worker.submit(generate("stream", PROMPT, max_tokens=5))
    beams = worker.submit(searching("a", BeamSearch(3), PROMPT, max_tokens=5))
    assert [row.cost_tokens for row in stream.rows] == [12]
    assert [row.cost_tokens for row in beams.rows] == [3 * 12]
