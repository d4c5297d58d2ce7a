"""service.worker.scheduler: by example, and in every order that Hypothesis can think of."""

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.worker.scheduler import Decode, Idle, Prefill, Row, RowKey, Scheduler


def row(name: str, num_prefill_tokens: int = 0) -> Row:
    return Row(RowKey(name, 0), num_prefill_tokens)


def test_an_empty_scheduler_is_idle():
    assert Scheduler(num_slots=2, chunk_tokens=4).next_action() == Idle()


def test_slots_go_to_the_rows_that_waited_longest_and_the_rest_wait_on():
    scheduler = Scheduler(num_slots=2, chunk_tokens=4)
    first, second, third = row("a"), row("b"), row("c")
    scheduler.submit([first, second, third])
    assert scheduler.start_waiting() == [first, second]
    assert {first.slot, second.slot} == {0, 1}
    assert scheduler.start_waiting() == []
    scheduler.remove(first)
    assert scheduler.start_waiting() == [third]
    assert third.slot == 0


def test_a_prompt_of_nine_tokens_is_prefilled_as_four_four_and_one():
    scheduler = Scheduler(num_slots=1, chunk_tokens=4)
    scheduler.submit([row("a", 9)])
    scheduler.start_waiting()
    chunks = []
    while isinstance(action := scheduler.next_action(), Prefill):
        chunks.append((action.start, action.end))
        scheduler.record_prefill(action)
    assert chunks == [(0, 4), (4, 8), (8, 9)]


def test_a_prompt_of_one_token_decodes_at_once():
    scheduler = Scheduler(num_slots=1, chunk_tokens=4)
    lone = row("a", 0)
    scheduler.submit([lone])
    scheduler.start_waiting()
    assert scheduler.next_action() == Decode((lone,))


def test_a_long_prompt_takes_turns_with_a_running_stream():
    scheduler = Scheduler(num_slots=2, chunk_tokens=4)
    scheduler.submit([row("stream", 0), row("long", 12)])
    scheduler.start_waiting()
    kinds = []
    for _ in range(7):
        action = scheduler.next_action()
        kinds.append(type(action).__name__)
        if isinstance(action, Prefill):
            scheduler.record_prefill(action)
    assert kinds == ["Prefill", "Decode", "Prefill", "Decode", "Prefill", "Decode", "Decode"]


def test_prompts_are_prefilled_one_after_another_in_the_order_of_their_arrival():
    scheduler = Scheduler(num_slots=2, chunk_tokens=4)
    scheduler.submit([row("a", 8), row("b", 4)])
    scheduler.start_waiting()
    order = []
    while isinstance(action := scheduler.next_action(), Prefill):
        order.append(action.row.key.request_id)
        scheduler.record_prefill(action)
        if len(order) == 2:
            scheduler.remove(action.row)
    assert order == ["a", "a", "b"]


def test_a_row_may_be_removed_twice_and_frees_its_slot_once():
    scheduler = Scheduler(num_slots=2, chunk_tokens=4)
    only = row("a")
    scheduler.submit([only])
    scheduler.start_waiting()
    scheduler.remove(only)
    scheduler.remove(only)
    assert scheduler.num_free_slots == 2


def test_a_row_removed_while_it_waits_never_starts():
    scheduler = Scheduler(num_slots=1, chunk_tokens=4)
    first, second = row("a"), row("b")
    scheduler.submit([first, second])
    scheduler.remove(first)
    assert scheduler.start_waiting() == [second]


def test_the_outputs_of_one_request_are_rows_of_their_own():
    scheduler = Scheduler(num_slots=2, chunk_tokens=4)
    outputs = [Row(RowKey("a", 0), 0), Row(RowKey("a", 1), 0)]
    scheduler.submit(outputs)
    scheduler.start_waiting()
    scheduler.remove(outputs[0])
    assert scheduler.next_action() == Decode((outputs[1],))


class AnyOrder(RuleBasedStateMachine):
    """Submits, starts, acts and removes in any order; everything known is checked throughout."""

    @initialize(num_slots=st.integers(1, 4), chunk_tokens=st.integers(1, 4))
    def create(self, num_slots: int, chunk_tokens: int) -> None:
        self.scheduler = Scheduler(num_slots, chunk_tokens)
        self.num_slots = num_slots
        self.chunk_tokens = chunk_tokens
        self.waiting: list[Row] = []
        self.running: list[Row] = []
        self.prefilled: dict[Row, int] = {}
        self.decoded: set[Row] = set()
        self.last_action: type | None = None
        self.num_rows = 0

    @rule(prompts=st.lists(st.integers(0, 11), min_size=1, max_size=4))
    def submit(self, prompts: list[int]) -> None:
        rows = [row(str(self.num_rows + index), prompt) for index, prompt in enumerate(prompts)]
        self.num_rows += len(rows)
        self.waiting += rows
        self.prefilled.update(dict.fromkeys(rows, 0))
        self.scheduler.submit(rows)

    @rule()
    def start(self) -> None:
        started = self.scheduler.start_waiting()
        num_free = self.num_slots - len(self.running)
        assert started == self.waiting[:num_free], "slots are filled, first come, first served"
        self.running += started
        del self.waiting[: len(started)]

    @rule()
    def act(self) -> None:
        prefilling = [each for each in self.running if not self.is_prefilled(each)]
        decoding = [each for each in self.running if self.is_prefilled(each)]
        action = self.scheduler.next_action()
        match action:
            case Prefill():
                assert action.row == prefilling[0], "the oldest prompt comes first"
                assert not (decoding and self.last_action is Prefill), "decoding rows starve"
                assert action.start == self.prefilled[action.row], "a gap or an overlap"
                assert action.start % self.chunk_tokens == 0
                whole_chunk = action.start + self.chunk_tokens
                assert action.end == min(whole_chunk, action.row.num_prefill_tokens)
                self.scheduler.record_prefill(action)
                self.prefilled[action.row] = action.end
            case Decode():
                assert list(action.rows) == decoding, "all rows that can decode do"
                assert not (prefilling and self.last_action is Decode), "prompts starve"
                self.decoded.update(action.rows)
            case Idle():
                assert self.running == []
        self.last_action = type(action)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if not self.prefilled:
            return
        gone = data.draw(st.sampled_from(list(self.prefilled)))
        self.scheduler.remove(gone)
        self.waiting = [each for each in self.waiting if each is not gone]
        self.running = [each for each in self.running if each is not gone]
        # So that it is not missed at the end; it may also have been removed before.
        self.decoded.add(gone)

    @invariant()
    def slots_are_neither_shared_nor_leaked(self) -> None:
        held = [each.slot for each in self.running]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(self.num_slots))
        assert self.scheduler.num_free_slots == self.num_slots - len(held)
        assert all(each.slot is None for each in self.prefilled if each not in self.running)

    def teardown(self) -> None:
        """What is left decodes, one row after another, and gives every slot back."""
        if self.num_rows == 0:
            return
        # Every row needs at most 11 chunks, each followed by at most one step, and a last step.
        for _ in range(23 * self.num_rows):
            self.start()
            self.act()
            for done in [each for each in self.running if each in self.decoded]:
                self.scheduler.remove(done)
                self.running.remove(done)
            self.slots_are_neither_shared_nor_leaked()
        assert self.decoded == set(self.prefilled), "a row never decoded"
        assert self.scheduler.num_free_slots == self.num_slots

    def is_prefilled(self, each: Row) -> bool:
        return self.prefilled[each] >= each.num_prefill_tokens


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_any_order_of_calls_keeps_every_promise = AnyOrder.TestCase
