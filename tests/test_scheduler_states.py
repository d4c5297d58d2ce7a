"""service.worker.scheduler in every order of calls that Hypothesis can think of.

Beside the scheduler stands what its actions do to the slots: which prompt each one holds, and how
far. What a slot held before it is given to a row counts as nothing.
"""

from dataclasses import dataclass

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.worker.scheduler import Copy, Decode, Idle, Prefill, Row, RowKey, Scheduler

MAX_PREFILL_TOKENS = 11


@dataclass(frozen=True)
class Content:
    """What a slot holds: the first tokens of a prompt, then what was decoded."""

    prompt: tuple[str, int]
    num_prefilled: int
    num_decoded: int = 0


def prompt_of(row: Row) -> tuple[str, int]:
    return row.key.request_id, row.prompt_index


class AnyOrder(RuleBasedStateMachine):
    """Submits, starts, acts and removes in any order; everything known is checked throughout."""

    @initialize(num_slots=st.integers(1, 5), chunk_tokens=st.integers(1, 4))
    def create(self, num_slots: int, chunk_tokens: int) -> None:
        self.scheduler = Scheduler(num_slots, chunk_tokens)
        self.num_slots = num_slots
        self.chunk_tokens = chunk_tokens
        self.contents: list[Content | None] = [None] * num_slots
        self.rows: list[Row] = []
        self.waiting: list[Row] = []
        self.running: list[Row] = []
        self.num_decoded: dict[Row, int] = {}
        self.ended: set[Row] = set()
        self.last_turn: type | None = None
        self.num_requests = 0

    @rule(
        prompts=st.lists(st.integers(0, MAX_PREFILL_TOKENS), min_size=1, max_size=2),
        num_choices=st.integers(1, 4),
    )
    def submit(self, prompts: list[int], num_choices: int) -> None:
        name = str(self.num_requests)
        rows = [
            Row(
                RowKey(name, output),
                num_prefill_tokens=prompts[output // num_choices],
                prompt_index=output // num_choices,
            )
            for output in range(len(prompts) * num_choices)
        ]
        self.num_requests += 1
        self.rows += rows
        self.waiting += rows
        self.num_decoded.update(dict.fromkeys(rows, 0))
        self.scheduler.submit(rows)

    @rule()
    def start(self) -> None:
        started = self.scheduler.start_waiting()
        num_free = self.num_slots - len(self.running)
        assert started == self.waiting[:num_free], "slots are filled, first come, first served"
        for row in started:
            assert row.slot is not None
            self.contents[row.slot] = None
        self.running += started
        del self.waiting[: len(started)]

    @rule()
    def act(self) -> None:
        unfilled = [row for row in self.running if not self.holds_its_prompt(row)]
        filled = [row for row in self.running if self.holds_its_prompt(row)]
        action = self.scheduler.next_action()
        match action:
            case Prefill():
                assert action.row is unfilled[0], "the oldest prompt comes first"
                assert not (filled and self.last_turn is Prefill), "decoding rows starve"
                self.check_chunk(action)
                self.fill(action.row, action.end)
                self.scheduler.record_prefill(action)
            case Copy(source, targets):
                assert source in self.running
                assert self.can_be_copied(source)
                assert list(targets) == [
                    row for row in unfilled if prompt_of(row) == prompt_of(source)
                ], "all that can share a prefill do"
                assert targets, "a copy to nobody"
                for row in targets:
                    self.fill(row, source.num_prefill_tokens)
                self.scheduler.record_copy(action)
            case Decode(rows):
                assert list(rows) == filled, "all rows that can decode do, and no other"
                assert rows, "a step of nobody"
                assert not (unfilled and self.last_turn is Decode), "prompts starve"
                assert self.sources() == [], "a prompt is lost that others could have had"
                for row in rows:
                    self.decode(row)
            case Idle():
                assert self.running == []
        if not isinstance(action, Copy):
            self.last_turn = type(action)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """One output ends, in whatever state; it may have ended before."""
        self.end(data.draw(st.sampled_from(self.rows)))

    @precondition(lambda self: self.sources())
    @rule()
    def remove_a_source(self) -> None:
        """The output that prefilled ends before it could be copied from."""
        self.end(self.sources()[0])

    @precondition(lambda self: any(self.num_decoded[row] for row in self.running))
    @rule(data=st.data())
    def end_some_that_decoded(self, data: st.DataObject) -> None:
        """As after a step in which some outputs met their stop."""
        decoded = [row for row in self.running if self.num_decoded[row]]
        for row in data.draw(st.lists(st.sampled_from(decoded), unique=True)):
            self.end(row)

    @precondition(lambda self: self.num_requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """All outputs of a request end, in whatever state."""
        name = str(data.draw(st.integers(0, self.num_requests - 1)))
        for row in self.rows:
            if row.key.request_id == name:
                self.end(row)

    @invariant()
    def slots_are_neither_shared_nor_leaked(self) -> None:
        held = [row.slot for row in self.running]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(self.num_slots))
        assert self.scheduler.num_free_slots == self.num_slots - len(held)
        assert all(row.slot is None for row in self.rows if row not in self.running)

    def teardown(self) -> None:
        """What is left decodes, one row after another, and gives every slot back."""
        if not self.rows:
            return
        # A row needs at most 11 chunks, each followed by at most one step, a copy, and a last step.
        for _ in range((2 * MAX_PREFILL_TOKENS + 2) * len(self.rows)):
            self.start()
            self.act()
            for row in [row for row in self.running if self.num_decoded[row]]:
                self.end(row)
            self.slots_are_neither_shared_nor_leaked()
            if len(self.ended) == len(self.rows):
                break
        assert self.ended == set(self.rows), "a row never decoded"
        assert self.scheduler.num_free_slots == self.num_slots
        assert self.scheduler.next_action() == Idle()

    def check_chunk(self, action: Prefill) -> None:
        row = action.row
        assert action.start % self.chunk_tokens == 0
        assert action.end == min(action.start + self.chunk_tokens, row.num_prefill_tokens)
        assert action.start < action.end
        if action.start > 0:
            assert self.content(row) == Content(prompt_of(row), action.start), "a gap or an overlap"
        assert self.sources() == [], "prefilled again although it could have been copied"

    def fill(self, row: Row, num_tokens: int) -> None:
        assert row.slot is not None
        self.contents[row.slot] = Content(prompt_of(row), num_tokens)

    def decode(self, row: Row) -> None:
        """Takes for granted that it holds its prompt; a prompt of one token has nothing to hold."""
        assert row.slot is not None
        self.num_decoded[row] += 1
        self.contents[row.slot] = Content(
            prompt_of(row), row.num_prefill_tokens, self.num_decoded[row]
        )

    def end(self, row: Row) -> None:
        self.scheduler.remove(row)
        self.ended.add(row)
        self.waiting = [other for other in self.waiting if other is not row]
        self.running = [other for other in self.running if other is not row]

    def content(self, row: Row) -> Content | None:
        assert row.slot is not None
        return self.contents[row.slot]

    def holds_its_prompt(self, row: Row) -> bool:
        """Its whole own prompt, and after it what this row decoded and nothing else."""
        if row.num_prefill_tokens == 0 and self.num_decoded[row] == 0:
            return True
        whole = Content(prompt_of(row), row.num_prefill_tokens, self.num_decoded[row])
        return self.content(row) == whole

    def sources(self) -> list[Row]:
        """Rows that others with the same prompt, but without it in their slots, can copy from."""
        unfilled = {prompt_of(row) for row in self.running if not self.holds_its_prompt(row)}
        return [
            row for row in self.running if prompt_of(row) in unfilled and self.can_be_copied(row)
        ]

    def can_be_copied(self, row: Row) -> bool:
        return self.content(row) == Content(prompt_of(row), row.num_prefill_tokens)


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_any_order_of_calls_keeps_every_promise = AnyOrder.TestCase
