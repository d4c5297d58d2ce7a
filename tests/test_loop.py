"""service.worker.loop: turns on the arithmetic engine, in this process, without a socket.

Texts are numbers: the prompt "1 2 3" is [0, 1, 2, 3] with bos, and continues with 6, 12, 24, 48.
"""

import dataclasses
import hashlib
import math
import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given, settings, strategies as st

from model.slots import DecodeRow, EngineOptions, PromptChunk
from service.protocol.messages import (
    Accepted,
    AdapterSource,
    Cancel,
    Event,
    Failed,
    Finished,
    Generate,
    OutputEnd,
    Piece,
    SamplingParameters,
    StopRules,
)
from service.worker.adapter_desk import AdapterDesk
from service.worker.adapter_store import AdapterStore
from service.worker.admission import Admission, AdmittedRequest, Refusal
from service.worker.loop import Arrival, Loop, LoopStatus
from service.worker.pace import Pace
from tests.fakes.arithmetic_engine import (
    EOS_ID,
    NOT_FINITE,
    RAISE,
    ArithmeticEngine,
    Sums,
    next_token,
)

NUM_SLOTS = 4


class RecordingEngine(ArithmeticEngine):
    """Notes which slots every decode step had, and what else was written."""

    def __init__(
        self, prefix_cache_bytes: int, context_tokens: int = 64, adapter_slots: int = 1
    ) -> None:
        options = EngineOptions(
            "x", NUM_SLOTS, context_tokens, Path("/nowhere"), prefix_cache_bytes
        )
        super().__init__(dataclasses.replace(options, adapter_slots=adapter_slots))
        self.decoded_slots: list[list[int]] = []
        self.prefilled: list[tuple[int, tuple[int, ...]]] = []
        self.copied: list[tuple[int, list[int], int]] = []

    def prefill(self, chunks: Sequence[PromptChunk]) -> Iterator[None]:
        self.prefilled += [(chunk.slot, tuple(chunk.token_ids)) for chunk in chunks]
        return super().prefill(chunks)

    def copy(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        self.copied.append((source, list(targets), num_tokens))
        super().copy(source, targets, num_tokens)

    def decode(self, rows: Sequence[DecodeRow], num_steps: int) -> Sums:
        self.decoded_slots.append([row.slot for row in rows])
        return super().decode(rows, num_steps)


class Steps(Pace):
    """As many steps in a dispatch as it is told."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def num_steps(self, most: int) -> int:
        return min(self.count, most)


class Worker:
    """Admission and loop of a worker process, without its threads."""

    def __init__(
        self,
        *,
        max_requests: int = 100,
        max_tokens: int = 10_000,
        num_steps: int = 1,
        prefix_cache_bytes: int = 0,
        context_tokens: int = 64,
        adapters: Sequence[AdapterSource] = (),
        joined_tokens: int = 0,
        adapter_slots: int = 1,
    ) -> None:
        self.engine = RecordingEngine(prefix_cache_bytes, context_tokens, adapter_slots)
        self.engine.joined_tokens = joined_tokens
        desk = AdapterDesk(self.engine, AdapterStore(adapters))
        self.admission = Admission(
            *(self.engine.info, self.engine.codec),
            max_requests=max_requests,
            max_tokens=max_tokens,
            adapters=desk.store,
        )
        self.arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self.frames: list[list[Event]] = []
        self.status = LoopStatus()
        self.loop = Loop(
            self.engine,
            self.admission,
            self.arrivals,
            self.frames.append,
            self.status,
            Steps(num_steps),
            desk,
        )
        self.open: dict[str, AdmittedRequest] = {}

    def submit(self, command: Generate) -> AdmittedRequest:
        request, accepted = self.admission.admit(command)
        assert accepted.request_id == command.request_id
        self.arrivals.put(request)
        self.open[command.request_id] = request
        return request

    def cancel(self, request_id: str) -> None:
        self.arrivals.put(Cancel(request_id))

    def turn(self) -> None:
        before = len(self.frames)
        self.loop.turn()
        for frame in self.frames[before:]:
            for event in frame:
                if isinstance(event, Finished | Failed):
                    del self.open[event.request_id]

    def run(self) -> None:
        """Turns until nothing is open."""
        for _ in range(10_000):
            if not self.open:
                return
            self.turn()
        raise AssertionError("the loop does not end")

    def events(self, request_id: str) -> list[Event]:
        return [event for frame in self.frames for event in frame if event.request_id == request_id]

    def tokens(self, request_id: str, output: int = 0) -> list[int]:
        pieces = [event for event in self.events(request_id) if isinstance(event, Piece)]
        return [id_ for piece in pieces if piece.output == output for id_ in piece.token_ids]

    def ends(self, request_id: str) -> tuple[OutputEnd, ...]:
        last = self.events(request_id)[-1]
        assert isinstance(last, Finished), last
        return last.outputs


def generate(
    request_id: str,
    *prompts: str | tuple[int, ...],
    max_tokens: int = 4,
    n: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    tenant: str = "default",
    priority: int = 0,
    adapter: str | None = None,
) -> Generate:
    return Generate(
        request_id=request_id,
        tenant=tenant,
        deadline=math.inf,
        adapter=adapter,
        prompts=prompts,
        num_choices=n,
        sampling=SamplingParameters(temperature, 0, 1.0, seed),
        stop=StopRules(max_tokens, 0, (), (), ignore_eos=False),
        num_logprobs=None,
        priority=priority,
    )


def test_a_prompt_is_continued_by_its_sum():
    worker = Worker()
    worker.submit(generate("a", "1 2 3"))
    worker.run()
    assert worker.tokens("a") == [6, 12, 24, 48]
    assert worker.ends("a") == (OutputEnd("length", None, 4),)


def test_a_prompt_longer_than_a_chunk_is_prefilled_whole():
    worker = Worker()
    worker.submit(generate("a", (1, 2, 3, 4, 5, 6, 7, 8, 9, 10), max_tokens=2))
    worker.run()
    assert worker.tokens("a") == [55, 110]


def test_a_prompt_goes_with_the_steps_of_others_and_its_blocks_are_kept():
    worker = Worker(joined_tokens=3, prefix_cache_bytes=1)
    prompt = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    worker.submit(generate("stream", (1,), max_tokens=9))
    worker.turn()
    worker.submit(generate("a", prompt, max_tokens=2))
    worker.run()
    assert worker.tokens("stream") == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert worker.tokens("a") == [45, 90]
    assert worker.engine.prefilled == [], "all of it went with steps"
    assert worker.status.work.prefill == 8
    worker.submit(generate("again", prompt, max_tokens=2))
    worker.run()
    assert worker.tokens("again") == [45, 90]
    assert worker.events("again")[-1].num_cached_tokens == 8


def test_a_row_joins_and_leaves_while_another_one_decodes():
    worker = Worker()
    worker.submit(generate("long", (1,), max_tokens=6))
    worker.turn()
    worker.submit(generate("short", (10,), max_tokens=2))
    worker.run()
    assert worker.tokens("long") == [1, 2, 4, 8, 16, 32]
    assert worker.tokens("short") == [10, 20]
    assert [len(slots) for slots in worker.engine.decoded_slots] == [1, 2, 2, 1, 1, 1]


def test_all_tokens_of_a_turn_leave_in_one_frame():
    worker = Worker()
    worker.submit(generate("a", (1,), max_tokens=1))
    worker.submit(generate("b", (2,), max_tokens=1))
    worker.turn()
    [frame] = worker.frames
    assert [type(event) for event in frame] == [Piece, Piece, Finished, Finished]


def test_a_request_with_more_outputs_than_slots_is_served_in_turns():
    worker = Worker()
    worker.submit(generate("a", (1,), (2,), (3,), n=2, max_tokens=2))
    worker.run()
    tokens = [worker.tokens("a", output) for output in range(6)]
    assert tokens == [[1, 2], [1, 2], [2, 4], [2, 4], [3, 6], [3, 6]]
    assert len(worker.ends("a")) == 6


def starts(worker: Worker, *commands: Generate) -> list[str]:
    """The order in which requests of one output get the one slot that is not taken."""
    worker.submit(generate("all others", (1,), n=NUM_SLOTS - 1, max_tokens=50))
    worker.turn()
    for command in commands:
        worker.submit(command)
    worker.run()
    pieces = [event for frame in worker.frames for event in frame if isinstance(event, Piece)]
    names = [piece.request_id for piece in pieces if piece.request_id != "all others"]
    return list(dict.fromkeys(names))


def test_whoever_waits_with_a_higher_priority_gets_a_slot_first():
    order = starts(
        Worker(),
        generate("low", (1,), max_tokens=1, priority=-8),
        generate("first", (1,), max_tokens=1),
        generate("second", (1,), max_tokens=1),
        generate("urgent", (1,), max_tokens=1, priority=8),
    )
    assert order == ["urgent", "first", "second", "low"]


def test_a_tenant_with_many_requests_and_one_with_long_ones_get_as_many_tokens():
    # One of a costs 1 + 2 tokens; one of b costs 4 + 5, and b moves on by as much as three of a.
    many = [generate(f"a{k}", (1,), max_tokens=2, tenant="a") for k in range(6)]
    long = [generate(f"b{k}", (1, 2, 3, 4), max_tokens=5, tenant="b") for k in range(2)]
    assert starts(Worker(), *many, *long) == ["a0", "b0", "a1", "a2", "a3", "b1", "a4", "a5"]


def test_the_outputs_of_a_prompt_are_prefilled_once_and_each_goes_on_as_it_would_alone():
    prompt = (1, 2, 3, 4, 5, 6, 7)
    worker = Worker()
    worker.submit(generate("a", prompt, n=3, temperature=1.0, seed=5))
    worker.run()
    assert worker.engine.prefilled == [(0, (1, 2, 3, 4)), (0, (5, 6))]
    assert worker.engine.copied == [(0, [1, 2], 6)]
    # 28, and the seed of the output.
    assert [worker.tokens("a", k)[0] for k in range(3)] == [33, 34, 35]
    for k in range(3):
        alone = Worker()
        alone.submit(generate("b", prompt, temperature=1.0, seed=5 + k))
        alone.run()
        assert worker.tokens("a", k) == alone.tokens("b")


def test_outputs_of_a_prompt_that_find_no_slot_prefill_it_together_later():
    worker = Worker()
    worker.submit(generate("a", (1, 2, 3), n=NUM_SLOTS + 2, max_tokens=2))
    worker.run()
    assert [slot for slot, _ in worker.engine.prefilled] == [0, 0]
    assert worker.engine.copied == [(0, [1, 2, 3], 2), (0, [1], 2)]
    assert [worker.tokens("a", k) for k in range(NUM_SLOTS + 2)] == [[6, 12]] * (NUM_SLOTS + 2)


def test_a_request_that_leaves_before_its_prompt_is_copied_gives_every_slot_back():
    worker = Worker()
    worker.submit(generate("a", (1, 2, 3, 4, 5, 6, 7), n=NUM_SLOTS))
    worker.turn()
    worker.cancel("a")
    worker.submit(generate("b", (1,), n=NUM_SLOTS, max_tokens=1))
    worker.run()
    assert worker.engine.copied == []
    assert sorted(worker.engine.decoded_slots[-1]) == [0, 1, 2, 3]


def test_a_dispatch_of_several_steps_is_one_piece_and_is_read_while_the_next_one_runs():
    worker = Worker(num_steps=3)
    worker.submit(generate("a", (1,), max_tokens=8))
    worker.turn()
    assert worker.events("a") == []
    worker.turn()
    [piece] = worker.events("a")
    assert piece.token_ids == (1, 2, 4)
    assert len(worker.engine.decoded_slots) == 2
    worker.run()
    assert worker.tokens("a") == [1, 2, 4, 8, 16, 32, 64, 128]
    assert len(worker.engine.decoded_slots) == 3


def test_while_somebody_waits_a_dispatch_is_one_step_and_is_read_at_once():
    worker = Worker(num_steps=8)
    worker.submit(generate("runs", (1,), n=NUM_SLOTS, max_tokens=3))
    worker.submit(generate("waits", (1,), max_tokens=1))
    worker.turn()
    assert [worker.tokens("runs", k) for k in range(NUM_SLOTS)] == [[1]] * NUM_SLOTS
    worker.run()
    # Two more steps of all, then the one that waited.
    assert [len(slots) for slots in worker.engine.decoded_slots] == [4, 4, 4, 1]


def test_what_follows_a_stop_in_a_dispatch_is_neither_sent_nor_counted():
    worker = Worker(num_steps=4)
    # 333 three times is 999, eos.
    worker.submit(generate("a", (333, 333, 333), max_tokens=50))
    worker.run()
    assert worker.tokens("a") == [EOS_ID]
    assert worker.ends("a") == (OutputEnd("stop", EOS_ID, 1),)


def test_a_prompt_that_another_one_began_with_is_not_prefilled_again(tmp_path):
    file = tmp_path / "tone.lora.h5"
    file.write_text("0")
    tone = AdapterSource(f"sha256:{hashlib.sha256(b'0').hexdigest()}", str(file))
    worker = Worker(prefix_cache_bytes=1000, adapters=[tone])
    worker.submit(generate("a", (1, 2, 3, 4, 5, 6, 7, 8, 9), max_tokens=1))
    worker.run()
    worker.engine.prefilled.clear()
    worker.submit(generate("b", (1, 2, 3, 4, 5, 6, 7, 8, 10, 11), n=2, max_tokens=2))
    worker.run()
    assert [token_ids for _, token_ids in worker.engine.prefilled] == [(10,)]
    assert worker.tokens("b") == [57, 114]
    assert worker.events("b")[-1].num_cached_tokens == 8
    # Another tenant, another adapter or another token before: not the same keys and values.
    worker.engine.prefilled.clear()
    for other in (
        {"tenant": "other"},
        {"adapter": tone.digest},
        {"prompts": ((2, 2, 3, 4, 5, 6, 7, 8, 9),)},
    ):
        command = generate("c", (1, 2, 3, 4, 5, 6, 7, 8, 9), max_tokens=1)
        worker.submit(msgspec.structs.replace(command, **other))
        worker.run()
        assert worker.events("c")[-1].num_cached_tokens == 0
        worker.frames.clear()
    assert len(worker.engine.prefilled) == 6


def test_short_prompts_that_arrive_together_are_prefilled_together():
    worker = Worker()
    for name, prompt in (("a", (1, 2, 3)), ("b", (4, 5, 6)), ("c", (7, 8, 9))):
        worker.submit(generate(name, prompt, max_tokens=1))
    worker.turn()
    assert worker.engine.prefilled == [(0, (1, 2)), (1, (4, 5))]
    worker.run()
    assert [worker.tokens(name) for name in "abc"] == [[6], [15], [24]]


def test_output_k_draws_with_the_seed_plus_k_modulo_two_to_the_32():
    worker = Worker()
    worker.submit(generate("a", (1,), n=2, temperature=1.0, seed=2**32 - 1, max_tokens=3))
    worker.run()
    # 1 + 4294967295 ends in 296; 1 + 296 + 4294967295 in 592; the second seed is 0.
    assert worker.tokens("a", 0) == [296, 592, 184]
    assert worker.tokens("a", 1) == [1, 2, 4]


def test_a_numerical_failure_ends_that_request_only():
    worker = Worker()
    worker.submit(generate("bad", (NOT_FINITE,)))
    worker.submit(generate("good", (1,)))
    worker.run()
    [failed] = worker.events("bad")
    assert isinstance(failed, Failed)
    assert failed.code == "numerical"
    assert worker.tokens("good") == [1, 2, 4, 8]


def test_a_numerical_failure_ends_every_output_of_its_request():
    worker = Worker()
    worker.submit(generate("good", (1,)))
    # Two outputs fail in the same step; the third prompt is still being prefilled then.
    worker.submit(generate("bad", (NOT_FINITE,), (NOT_FINITE,), (1, 2, 3, NOT_FINITE, 5, 6)))
    worker.run()
    assert worker.tokens("good") == [1, 2, 4, 8]
    assert [type(event) for event in worker.events("bad")] == [Failed]


def test_a_deadline_before_the_first_token_fails():
    worker = Worker()
    request = worker.submit(generate("a", (1, 2, 3, 4, 5, 6, 7, 8, 9)))
    worker.turn()
    request.deadline = 0.0
    worker.run()
    [failed] = worker.events("a")
    assert isinstance(failed, Failed)
    assert failed.code == "deadline_exceeded"


def test_a_deadline_after_the_first_token_finishes_with_what_there_is():
    worker = Worker()
    request = worker.submit(generate("a", (1,), (2,), max_tokens=50))
    worker.turn()
    worker.turn()
    request.deadline = time.monotonic()
    worker.run()
    assert worker.tokens("a", 0) == [1, 2]
    assert worker.ends("a") == (OutputEnd("timeout", None, 2), OutputEnd("timeout", None, 2))


def test_a_deadline_is_kept_also_while_the_request_waits_for_a_slot():
    worker = Worker()
    worker.submit(generate("all slots", (1,), n=NUM_SLOTS, max_tokens=9))
    worker.turn()
    waiting = worker.submit(generate("waiting", (2,)))
    worker.turn()
    waiting.deadline = 0.0
    worker.turn()
    assert [type(event) for event in worker.events("waiting")] == [Failed]
    assert worker.admission.num_waiting == 0


def test_a_cancel_ends_what_runs_and_leaves_what_had_ended():
    worker = Worker()
    # The first prompt draws eos as its second token: 500 + 499 is 999.
    worker.submit(generate("a", (499,), (500,), (333, 333, 333), max_tokens=50))
    for _ in range(4):
        worker.turn()
    worker.cancel("a")
    worker.run()
    ends = worker.ends("a")
    assert [end.finish_reason for end in ends] == ["cancelled", "cancelled", "stop"]
    assert worker.tokens("a", 2) == [EOS_ID]


def test_a_cancel_of_nothing_is_ignored():
    worker = Worker()
    worker.cancel("never seen")
    worker.submit(generate("a", (1,), max_tokens=1))
    worker.run()
    worker.cancel("a")
    worker.turn()
    assert [type(event) for event in worker.events("a")] == [Piece, Finished]


def test_what_runs_and_what_waits_is_told_apart_also_before_the_loop_has_seen_it():
    worker = Worker()
    worker.submit(generate("runs", (1,), max_tokens=9))
    worker.turn()
    assert (worker.status.num_running, worker.admission.num_waiting) == (1, 0)
    for name in "abcdefg":
        worker.admission.admit(generate(name, (1, 2, 3)))
    worker.turn()
    assert worker.status.num_running == 1
    assert worker.admission.num_waiting == 7
    assert worker.admission.num_waiting_tokens == 21


def test_a_failing_step_is_not_swallowed():
    worker = Worker()
    worker.submit(generate("a", (RAISE,)))
    with pytest.raises(RuntimeError, match="the step failed"):
        worker.run()


def test_timings_are_in_order():
    worker = Worker()
    worker.submit(generate("a", (1,)))
    worker.run()
    timings = worker.events("a")[-1].timings
    assert 0 <= timings.queue_seconds <= timings.first_token_seconds <= timings.total_seconds < 5


def test_a_queue_takes_as_many_requests_as_it_may():
    worker = Worker(max_requests=2)
    worker.submit(generate("a", (1,)))
    worker.submit(generate("b", (1,)))
    with pytest.raises(Refusal) as refusal:
        worker.admission.admit(generate("c", (1,)))
    assert refusal.value.failed.code == "queue_full"
    assert refusal.value.failed.retry_after_seconds == 1
    worker.run()
    worker.submit(generate("d", (1,)))


def test_a_queue_takes_as_many_tokens_as_it_may_and_one_request_of_any_length():
    worker = Worker(max_tokens=5)
    worker.submit(generate("a", (1, 2, 3), (4, 5, 6)))
    with pytest.raises(Refusal, match="queue_full"):
        worker.admission.admit(generate("b", (1,)))
    worker.run()
    worker.submit(generate("c", (1, 2, 3)))
    worker.submit(generate("d", (1, 2)))
    with pytest.raises(Refusal, match="queue_full"):
        worker.admission.admit(generate("e", (1,)))


def test_an_accepted_request_is_told_the_tokens_of_each_prompt_with_bos_for_text():
    _, accepted = Worker().admission.admit(generate("a", "1 2 3", (1, 2, 3), ""))
    assert accepted == Accepted("a", (4, 3, 1))


@dataclass
class Plan:
    """One request of a mix: what it asks, when it comes, and what happens to it."""

    prompts: list[list[int]]
    n: int
    max_tokens: int
    seed: int | None
    arrives_at: int
    fate: str
    fate_at: int = field(default=0)


PLANS = st.builds(
    Plan,
    prompts=st.lists(
        st.lists(st.integers(1, 300), min_size=1, max_size=11), min_size=1, max_size=3
    ),
    n=st.integers(1, 3),
    max_tokens=st.integers(1, 7),
    seed=st.none() | st.integers(0, 2**32 - 1),
    arrives_at=st.integers(0, 12),
    fate=st.sampled_from(["ends", "ends", "ends", "cancelled", "timeout", "not finite"]),
    fate_at=st.integers(0, 20),
)


def continuation(prompt: list[int], seed: int, max_tokens: int) -> list[int]:
    """What the engine draws for one output when it is alone."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens, seed))
        if tokens[-1] == EOS_ID:
            break
    return tokens[len(prompt) :]


def outputs_alone(plan: Plan) -> list[list[int]]:
    """What each output of a plan is when it is alone; k = prompt * n + choice."""
    return [
        continuation(
            plan.prompts[k // plan.n],
            0 if plan.seed is None else (plan.seed + k) % 2**32,
            plan.max_tokens,
        )
        for k in range(len(plan.prompts) * plan.n)
    ]


@given(
    plans=st.lists(PLANS, min_size=1, max_size=7),
    num_steps=st.integers(1, 8),
    joined_tokens=st.sampled_from([0, 1, 3, 5]),
)
@settings(max_examples=150, deadline=None)
def test_in_any_company_a_request_gets_what_it_gets_alone_and_one_end(
    plans, num_steps, joined_tokens
):
    alone = [outputs_alone(plan) for plan in plans]
    # Tokens that make the engine misbehave must not be drawn by chance.
    assume(not any(901 <= id_ <= 904 for outputs in alone for ids in outputs for id_ in ids))

    worker = Worker(num_steps=num_steps, joined_tokens=joined_tokens)
    requests: dict[int, AdmittedRequest] = {}
    for turn in range(35):
        for number, plan in enumerate(plans):
            if plan.arrives_at == turn:
                prompts = [tuple(prompt) for prompt in plan.prompts]
                if plan.fate == "not finite":
                    prompts[-1] = (*prompts[-1], NOT_FINITE)
                requests[number] = worker.submit(
                    generate(
                        str(number),
                        *prompts,
                        n=plan.n,
                        max_tokens=plan.max_tokens,
                        temperature=0.0 if plan.seed is None else 1.0,
                        seed=plan.seed or 0,
                    )
                )
            if plan.arrives_at + plan.fate_at == turn and plan.fate == "cancelled":
                worker.cancel(str(number))
            if plan.arrives_at + plan.fate_at == turn and plan.fate == "timeout":
                requests[number].deadline = 0.0
        if worker.open:
            worker.turn()
    worker.run()

    for number, plan in enumerate(plans):
        *before, last = worker.events(str(number))
        assert all(isinstance(event, Piece) for event in before), "one terminal event, at the end"
        drawn = [worker.tokens(str(number), output) for output in range(len(alone[number]))]
        if isinstance(last, Failed):
            code = {"timeout": "deadline_exceeded", "not finite": "numerical"}[plan.fate]
            assert last.code == code
            continue
        assert isinstance(last, Finished)
        for ids, expected, end in zip(drawn, alone[number], last.outputs, strict=True):
            assert end.num_tokens == len(ids)
            if end.finish_reason in ("stop", "length"):
                assert ids == expected
                assert end.finish_reason == ("stop" if ids[-1] == EOS_ID else "length")
            else:
                assert end.finish_reason == plan.fate
                assert ids == expected[: len(ids)]

    assert worker.admission.num_waiting == worker.admission.num_waiting_tokens == 0
    # All slots are free again: as many rows as there are slots decode in one step.
    worker.submit(generate("last", (1,), n=NUM_SLOTS, max_tokens=1))
    worker.turn()
    assert sorted(worker.engine.decoded_slots[-1]) == [0, 1, 2, 3]
    assert worker.open == {}
