"""service.worker.scheduler in every order of calls that Hypothesis can think of.

Beside the scheduler stands what its actions do to the slots: which prompt each one holds, and how
far. What a slot held before it is given to a row counts as nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.worker.actions import (
    Chunk,
    Copy,
    Decode,
    Idle,
    Join,
    LookUp,
    Prefill,
    Row,
    RowKey,
    Search,
    Spread,
)
from service.worker.scheduler import PrefillLimits, Scheduler

MAX_PREFILL_TOKENS = 11


@dataclass(frozen=True)
class Content:
    """What a slot holds: the first tokens of a prompt, then what was decoded."""

    prompt: tuple[str, int]
    num_prefilled: int
    num_decoded: int = 0


def line_of(row: Row) -> tuple[str, int]:
    return row.tenant, row.priority


def prompt_of(row: Row) -> tuple[str, int]:
    return row.key.request_id, row.prompt_index


class AnyOrder(RuleBasedStateMachine):
    """Submits, starts, acts and removes in any order; everything known is checked throughout."""

    @initialize(
        num_slots=st.integers(1, 5),
        chunk_tokens=st.integers(1, 4),
        packed_tokens=st.integers(0, 4),
        keeps_prefixes=st.booleans(),
        joined_tokens=st.integers(0, 5),
    )
    def create(
        self,
        num_slots: int,
        chunk_tokens: int,
        packed_tokens: int,
        keeps_prefixes: bool,
        joined_tokens: int,
    ) -> None:
        packed_tokens = min(packed_tokens, chunk_tokens)
        joined_rows = 3 if joined_tokens else 0
        self.limits = PrefillLimits(chunk_tokens, packed_tokens, 3, joined_tokens, joined_rows)
        self.keeps_prefixes = keeps_prefixes
        self.scheduler = Scheduler(num_slots, self.limits, keeps_prefixes=keeps_prefixes)
        self.looked_up: set[Row] = set()
        self.begun: Prefill | None = None
        self.num_slots = num_slots
        self.chunk_tokens = chunk_tokens
        self.contents: list[Content | None] = [None] * num_slots
        self.rows: list[Row] = []
        self.waiting: list[Row] = []
        self.running: list[Row] = []
        self.num_decoded: dict[Row, int] = {}
        self.ended: set[Row] = set()
        # Kind of turn that could be taken -> turns that others took since.
        self.passed: dict[type, Counter[type]] = {}
        # Search -> how many steps of searches there were at its last one.
        self.searched_at: dict[Row, int] = {}
        self.num_requests = 0

    @rule(
        prompts=st.lists(st.integers(0, MAX_PREFILL_TOKENS), min_size=1, max_size=2),
        num_choices=st.integers(1, 4),
        tenant=st.sampled_from("ab"),
        priority=st.sampled_from([0, 0, 1]),
        may_join=st.sampled_from([True, True, False]),
    )
    def submit(
        self, prompts: list[int], num_choices: int, tenant: str, priority: int, may_join: bool
    ) -> None:
        name = str(self.num_requests)
        rows = [
            Row(
                RowKey(name, output),
                num_prefill_tokens=prompts[output // num_choices],
                prompt_index=output // num_choices,
                tenant=tenant,
                priority=priority,
                cost_tokens=prompts[output // num_choices] + 1,
                may_join=may_join,
            )
            for output in range(len(prompts) * num_choices)
        ]
        self.num_requests += 1
        self.rows += rows
        self.waiting += rows
        self.num_decoded.update(dict.fromkeys(rows, 0))
        self.scheduler.submit(rows)

    @precondition(lambda self: self.num_slots > 1)
    @rule(
        num_prefill_tokens=st.integers(0, MAX_PREFILL_TOKENS),
        width=st.integers(2, 5),
        tenant=st.sampled_from("ab"),
        priority=st.sampled_from([0, 0, 1]),
    )
    def submit_search(
        self, num_prefill_tokens: int, width: int, tenant: str, priority: int
    ) -> None:
        width = min(width, self.num_slots)
        row = Row(
            RowKey(str(self.num_requests), 0),
            num_prefill_tokens,
            tenant=tenant,
            priority=priority,
            cost_tokens=width * (num_prefill_tokens + 1),
            num_slots=width,
        )
        self.num_requests += 1
        self.rows.append(row)
        self.waiting.append(row)
        self.num_decoded[row] = 0
        self.scheduler.submit([row])

    @rule()
    def start(self) -> None:
        started = self.scheduler.start_waiting()
        for row in started:
            assert len(row.slots) == row.num_slots, "all or none"
            for slot in row.slots:
                self.contents[slot] = None
            assert row.priority == max(other.priority for other in self.waiting)
            queue = [other for other in self.waiting if line_of(other) == line_of(row)]
            assert row is queue[0], "within a tenant, first come, first served"
            self.waiting.remove(row)
        self.running += started
        num_free = self.num_slots - sum(len(row.slots) for row in self.running)
        highest = [row for row in self.waiting if row.priority == self.waiting_priority()]
        firsts = {line_of(row): row for row in reversed(highest)}.values()
        assert not firsts or num_free < max(row.num_slots for row in firsts), "slots stay empty"

    def waiting_priority(self) -> int:
        return max((row.priority for row in self.waiting), default=0)

    @rule(num_found=st.integers(0, 3), is_part=st.booleans())
    def act(self, num_found: int = 0, is_part: bool = False) -> None:
        unfilled = [row for row in self.running if not self.holds_its_prompt(row)]
        filled = [row for row in self.running if self.holds_its_prompt(row)]
        searching = [row for row in filled if row.is_search]
        filled = [row for row in filled if not row.is_search]
        action = self.scheduler.next_action()
        match action:
            case LookUp(row):
                assert self.keeps_prefixes
                assert row is unfilled[0], "the oldest prompt comes first"
                assert row not in self.looked_up, "looked up twice"
                self.looked_up.add(row)
                num_found = min(num_found, row.num_prefill_tokens // self.chunk_tokens)
                if num_found:
                    self.fill(row, num_found * self.chunk_tokens)
                self.scheduler.record_look_up(row, num_found)
            case Prefill(chunks):
                if self.begun is None:
                    assert chunks[0].row is unfilled[0], "the oldest prompt comes first"
                    assert not (filled and self.may_join([unfilled[0], *filled]))
                    self.check_chunks(chunks, self.chunk_tokens, self.limits.packed_tokens)
                else:
                    assert action is self.begun, "a chunk is lost that was begun"
                self.begun = action
                if not is_part:
                    for chunk in chunks:
                        self.fill(chunk.row, chunk.end)
                    self.scheduler.record_prefill(action)
                    self.begun = None
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
                assert self.sources() == [], "a prompt is lost that others could have had"
                for row in rows:
                    self.decode(row)
            case Join(chunks, rows):
                assert self.begun is None, "a chunk is lost that was begun"
                assert list(rows) == filled, "all rows that can decode do, and no other"
                assert chunks[0].row is unfilled[0], "the oldest prompt comes first"
                assert self.may_join([*{chunk.row for chunk in chunks}, *rows])
                self.check_chunks(chunks, self.limits.joined_tokens, self.limits.joined_tokens)
                for chunk in chunks:
                    self.fill(chunk.row, chunk.end)
                for row in rows:
                    self.decode(row)
                self.scheduler.record_prefill(action)
            case Spread(row):
                assert row.is_search
                assert row in unfilled
                assert self.content(row) == Content(prompt_of(row), row.num_prefill_tokens)
                self.fill(row, row.num_prefill_tokens, row.slots)
                self.scheduler.record_spread(action)
            case Search(row):
                longest = min(searching, key=lambda row: self.searched_at.get(row, 0))
                assert row is longest, "another search waits longer"
                self.searched_at[row] = max(self.searched_at.values(), default=0) + 1
                self.decode(row)
            case Idle():
                assert self.running == []
        if not isinstance(action, LookUp | Copy | Spread | Idle):
            due = {Prefill: unfilled, Decode: filled, Search: searching}
            taken = {Prefill, Decode} if isinstance(action, Join) else {type(action)}
            self.note_turn(taken, {kind for kind, rows in due.items() if rows})

    def may_join(self, rows: list[Row]) -> bool:
        num_filled = sum(self.holds_its_prompt(row) for row in rows)
        return num_filled <= self.limits.joined_rows and all(row.may_join for row in rows)

    def note_turn(self, taken: set[type], due: set[type]) -> None:
        """Nobody waits for more than one turn of another kind."""
        assert taken <= due
        self.passed = {kind: self.passed.get(kind, Counter()) for kind in due - taken}
        for turns in self.passed.values():
            turns.update(taken)
            assert max(turns.values()) == 1, f"{turns}: twice while another kind waits"

    @rule(count=st.integers(2, 9))
    def act_on_and_on(self, count: int) -> None:
        self.start()
        for _ in range(count):
            self.act()

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
        held = [slot for row in self.running for slot in row.slots]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(self.num_slots))
        assert self.scheduler.num_free_slots == self.num_slots - len(held)
        assert all(row.slots == () for row in self.rows if row not in self.running)
        assert all(len(row.slots) == row.num_slots for row in self.running)

    def teardown(self) -> None:
        """What is left decodes, one row after another, and gives every slot back."""
        if not self.rows:
            return
        # A row needs at most 11 chunks, each followed by at most a step and one of a search, then a
        # look-up, a copy, and a last step.
        for _ in range((3 * MAX_PREFILL_TOKENS + 4) * len(self.rows)):
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

    def check_chunks(self, chunks: tuple[Chunk, ...], of_first: int, of_all: int) -> None:
        for chunk in chunks:
            row = chunk.row
            assert chunk.start % self.chunk_tokens == 0 or self.limits.joined_tokens
            border = (chunk.start // self.chunk_tokens + 1) * self.chunk_tokens
            most = of_first if chunk is chunks[0] else of_all
            assert chunk.end == min(chunk.start + most, border, row.num_prefill_tokens)
            assert chunk.start < chunk.end
            if chunk.start > 0:
                held = Content(prompt_of(row), chunk.start)
                assert self.content(row) == held, "a gap or an overlap"
            has_whole_chunk = row.num_prefill_tokens >= self.chunk_tokens
            assert row in self.looked_up or not (self.keeps_prefixes and has_whole_chunk)
        assert self.sources() == [], "prefilled again although it could have been copied"
        if len(chunks) > 1:
            assert sum(chunk.end - chunk.start for chunk in chunks) <= of_all
            assert len(chunks) <= self.limits.packed_prompts
            prompts = {prompt_of(chunk.row) for chunk in chunks}
            assert len(prompts) == len(chunks), "a prompt is prefilled twice"

    def fill(self, row: Row, num_tokens: int, slots: Sequence[int] = ()) -> None:
        for slot in slots or row.slots[:1]:
            self.contents[slot] = Content(prompt_of(row), num_tokens)

    def decode(self, row: Row) -> None:
        """Takes for granted that it holds its prompt; a prompt of one token has nothing to hold."""
        assert row.slots
        self.num_decoded[row] += 1
        for slot in row.slots:
            self.contents[slot] = Content(
                prompt_of(row), row.num_prefill_tokens, self.num_decoded[row]
            )

    def end(self, row: Row) -> None:
        self.scheduler.remove(row)
        if self.begun and any(chunk.row is row for chunk in self.begun.chunks):
            self.begun = None
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
        return all(self.contents[slot] == whole for slot in row.slots)

    def sources(self) -> list[Row]:
        """Rows that others with the same prompt, but without it in their slots, can copy from."""
        unfilled = {prompt_of(row) for row in self.running if not self.holds_its_prompt(row)}
        return [
            row for row in self.running if prompt_of(row) in unfilled and self.can_be_copied(row)
        ]

    def can_be_copied(self, row: Row) -> bool:
        return not row.is_search and self.content(row) == Content(
            prompt_of(row), row.num_prefill_tokens
        )


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_any_order_of_calls_keeps_every_promise = AnyOrder.TestCase
