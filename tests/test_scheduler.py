"""service.worker.scheduler by example; `test_scheduler_states` tries every order of calls."""

from service.worker.actions import (
    Action,
    Chunk,
    Copy,
    Decode,
    Idle,
    Join,
    LookUp,
    Prefill,
    ReadScores,
    Row,
    RowKey,
    Search,
    Spread,
)
from service.worker.scheduler import PrefillLimits, Scheduler

LIMITS = PrefillLimits(chunk_tokens=4)


def row(name: str, num_prefill_tokens: int = 0) -> Row:
    return Row(RowKey(name, 0), num_prefill_tokens)


def outputs(name: str, num_prefill_tokens: int, num_outputs: int) -> list[Row]:
    """The outputs of one prompt."""
    return [Row(RowKey(name, k), num_prefill_tokens) for k in range(num_outputs)]


def chunk(row: Row, start: int, end: int) -> Prefill:
    """A chunk of one prompt, alone."""
    return Prefill((Chunk(row, start, end),))


def perform(scheduler: Scheduler) -> Action:
    """The next action, recorded as done."""
    action = scheduler.next_action()
    if isinstance(action, Prefill | Join):
        scheduler.record_prefill(action)
    elif isinstance(action, Copy):
        scheduler.record_copy(action)
    elif isinstance(action, Spread):
        scheduler.record_spread(action)
    return action


def search(name: str, num_slots: int, num_prefill_tokens: int = 0) -> Row:
    return Row(RowKey(name, 0), num_prefill_tokens, num_slots=num_slots)


def test_an_empty_scheduler_is_idle():
    assert Scheduler(2, LIMITS).next_action() == Idle()


def test_slots_go_to_the_rows_that_waited_longest_and_the_rest_wait_on():
    scheduler = Scheduler(2, LIMITS)
    first, second, third = row("a"), row("b"), row("c")
    scheduler.submit([first, second, third])
    assert scheduler.start_waiting() == [first, second]
    assert {first.slot, second.slot} == {0, 1}
    assert scheduler.start_waiting() == []
    scheduler.remove(first)
    assert scheduler.start_waiting() == [third]
    assert third.slot == 0


def test_slots_go_to_the_higher_priority_and_then_to_the_tenant_that_had_fewer_tokens():
    scheduler = Scheduler(1, LIMITS)
    long = [Row(RowKey(f"long{k}", 0), 0, tenant="a", cost_tokens=20) for k in range(2)]
    short = [Row(RowKey(f"short{k}", 0), 0, tenant="b", cost_tokens=10) for k in range(3)]
    urgent = Row(RowKey("urgent", 0), 0, tenant="a", priority=1, cost_tokens=99)
    scheduler.submit([*long, *short, urgent])
    order = []
    for _ in range(6):
        [row] = scheduler.start_waiting()
        order.append(row.key.request_id)
        scheduler.remove(row)
    assert order == ["urgent", "long0", "short0", "short1", "long1", "short2"]


def test_a_prompt_of_nine_tokens_is_prefilled_as_four_four_and_one():
    scheduler = Scheduler(1, LIMITS)
    scheduler.submit([row("a", 9)])
    scheduler.start_waiting()
    chunks = []
    while isinstance(action := scheduler.next_action(), Prefill):
        [only] = action.chunks
        chunks.append((only.start, only.end))
        scheduler.record_prefill(action)
    assert chunks == [(0, 4), (4, 8), (8, 9)]


def test_a_prompt_of_one_token_decodes_at_once():
    scheduler = Scheduler(1, LIMITS)
    lone = row("a", 0)
    scheduler.submit([lone])
    scheduler.start_waiting()
    assert scheduler.next_action() == Decode((lone,))


def test_a_long_prompt_takes_turns_with_a_running_stream():
    scheduler = Scheduler(2, LIMITS)
    scheduler.submit([row("stream", 0), row("long", 12)])
    scheduler.start_waiting()
    kinds = []
    for _ in range(7):
        action = scheduler.next_action()
        kinds.append(type(action).__name__)
        if isinstance(action, Prefill):
            scheduler.record_prefill(action)
    assert kinds == ["Prefill", "Decode", "Prefill", "Decode", "Prefill", "Decode", "Decode"]


def joining(num_rows: int = 2, keeps_prefixes: bool = False) -> Scheduler:
    limits = PrefillLimits(chunk_tokens=8, packed_prompts=3, joined_tokens=5, joined_rows=num_rows)
    return Scheduler(4, limits, keeps_prefixes=keeps_prefixes)


def spans(action: Action) -> list[tuple[str, int, int]]:
    assert isinstance(action, Prefill | Join)
    return [(chunk.row.key.request_id, chunk.start, chunk.end) for chunk in action.chunks]


def test_a_long_prompt_goes_with_the_steps_of_a_running_stream_and_ends_at_whole_chunks():
    scheduler = joining()
    stream, long = row("stream", 0), row("long", 11)
    scheduler.submit([stream, long])
    scheduler.start_waiting()
    turns = [perform(scheduler) for _ in range(3)]
    assert [turn.rows for turn in turns] == [(stream,)] * 3
    assert [spans(turn) for turn in turns] == [
        [("long", 0, 5)],
        [("long", 5, 8)],
        [("long", 8, 11)],
    ]
    assert perform(scheduler) == Decode((stream, long))


def test_short_prompts_go_with_the_same_step_and_a_part_of_one_does_not():
    scheduler = joining(num_rows=3)
    scheduler.submit([row("stream", 0), row("a", 2), row("b", 4), row("c", 3)])
    scheduler.start_waiting()
    first, second = perform(scheduler), perform(scheduler)
    assert spans(first) == [("a", 0, 2), ("c", 0, 3)]
    assert spans(second) == [("b", 0, 4)]
    assert isinstance(second, Join)
    assert [each.key.request_id for each in second.rows] == ["stream", "a", "c"]


def test_a_prompt_that_is_alone_again_goes_on_where_the_steps_left_it():
    scheduler = joining()
    stream, long = row("stream", 0), row("long", 20)
    scheduler.submit([stream, long])
    scheduler.start_waiting()
    assert spans(perform(scheduler)) == [("long", 0, 5)]
    scheduler.remove(stream)
    assert spans(perform(scheduler)) == [("long", 5, 8)]
    assert spans(perform(scheduler)) == [("long", 8, 16)]


def test_rows_take_turns_with_a_prompt_if_one_of_them_may_not_be_joined_or_they_are_many():
    for num_rows, may_join in ((2, False), (1, True)):
        scheduler = joining(num_rows)
        rows = [row("a", 0), row("b", 0)]
        rows[1].may_join = may_join
        scheduler.submit([*rows, row("long", 8)])
        scheduler.start_waiting()
        assert [type(perform(scheduler)) for _ in range(3)] == [Prefill, Decode, Decode]


def test_scores_wait_for_one_joined_turn_and_have_a_step_behind_them():
    scheduler = joining()
    scheduler.has_scores = True
    scheduler.submit([row("stream", 0), row("long", 100)])
    scheduler.start_waiting()
    kinds = [type(perform(scheduler)) for _ in range(7)]
    assert kinds == [Join, ReadScores, Decode, Join, ReadScores, Decode, Join]


def test_prompts_are_prefilled_one_after_another_in_the_order_of_their_arrival():
    scheduler = Scheduler(2, LIMITS)
    scheduler.submit([row("a", 8), row("b", 4)])
    scheduler.start_waiting()
    order = []
    while isinstance(action := scheduler.next_action(), Prefill):
        [only] = action.chunks
        order.append(only.row.key.request_id)
        scheduler.record_prefill(action)
        if len(order) == 2:
            scheduler.remove(only.row)
    assert order == ["a", "a", "b"]


def test_a_row_may_be_removed_twice_and_frees_its_slot_once():
    scheduler = Scheduler(2, LIMITS)
    only = row("a")
    scheduler.submit([only])
    scheduler.start_waiting()
    scheduler.remove(only)
    scheduler.remove(only)
    assert scheduler.num_free_slots == 2


def test_a_row_removed_while_it_waits_never_starts():
    scheduler = Scheduler(1, LIMITS)
    first, second = row("a"), row("b")
    scheduler.submit([first, second])
    scheduler.remove(first)
    assert scheduler.start_waiting() == [second]


def test_the_outputs_of_one_request_are_rows_of_their_own():
    scheduler = Scheduler(2, LIMITS)
    outputs = [Row(RowKey("a", 0), 0), Row(RowKey("a", 1), 0)]
    scheduler.submit(outputs)
    scheduler.start_waiting()
    scheduler.remove(outputs[0])
    assert scheduler.next_action() == Decode((outputs[1],))


def test_outputs_of_one_prompt_prefill_it_once_and_start_together():
    scheduler = Scheduler(3, LIMITS)
    first, second, third = outputs("a", 6, 3)
    scheduler.submit([first, second, third])
    scheduler.start_waiting()
    assert [perform(scheduler) for _ in range(4)] == [
        chunk(first, 0, 4),
        chunk(first, 4, 6),
        Copy(first, (second, third)),
        Decode((first, second, third)),
    ]


def test_a_copy_takes_no_turn_of_a_running_stream():
    scheduler = Scheduler(3, LIMITS)
    stream = row("stream")
    first, second = outputs("a", 8, 2)
    scheduler.submit([stream, first, second])
    scheduler.start_waiting()
    assert [perform(scheduler) for _ in range(5)] == [
        chunk(first, 0, 4),
        Decode((stream,)),
        chunk(first, 4, 8),
        Copy(first, (second,)),
        Decode((stream, first, second)),
    ]


def test_an_output_that_gets_a_slot_once_the_first_one_decodes_prefills_for_itself():
    scheduler = Scheduler(2, LIMITS)
    stream = row("stream")
    first, second = outputs("a", 4, 2)
    scheduler.submit([stream, first, second])
    scheduler.start_waiting()
    assert [perform(scheduler) for _ in range(2)] == [chunk(first, 0, 4), Decode((stream, first))]
    scheduler.remove(stream)
    assert scheduler.start_waiting() == [second]
    assert [perform(scheduler) for _ in range(2)] == [
        chunk(second, 0, 4),
        Decode((first, second)),
    ]


def test_an_output_that_gets_a_slot_just_before_the_first_one_decodes_is_copied_to():
    scheduler = Scheduler(2, LIMITS)
    stream = row("stream")
    first, second = outputs("a", 4, 2)
    scheduler.submit([stream, first, second])
    scheduler.start_waiting()
    assert perform(scheduler) == chunk(first, 0, 4)
    scheduler.remove(stream)
    scheduler.start_waiting()
    assert perform(scheduler) == Copy(first, (second,))


def test_if_the_output_that_prefills_leaves_the_next_one_begins_anew():
    scheduler = Scheduler(3, LIMITS)
    first, second, third = outputs("a", 8, 3)
    scheduler.submit([first, second, third])
    scheduler.start_waiting()
    assert perform(scheduler) == chunk(first, 0, 4)
    scheduler.remove(first)
    assert [perform(scheduler) for _ in range(3)] == [
        chunk(second, 0, 4),
        chunk(second, 4, 8),
        Copy(second, (third,)),
    ]


def test_if_the_output_to_copy_from_leaves_the_next_one_begins_anew():
    scheduler = Scheduler(2, LIMITS)
    first, second = outputs("a", 4, 2)
    scheduler.submit([first, second])
    scheduler.start_waiting()
    assert perform(scheduler) == chunk(first, 0, 4)
    scheduler.remove(first)
    assert perform(scheduler) == chunk(second, 0, 4)


def test_equal_prompts_of_other_requests_and_of_other_places_are_not_copied():
    scheduler = Scheduler(3, LIMITS)
    one = Row(RowKey("a", 0), 4, prompt_index=0)
    other_place = Row(RowKey("a", 1), 4, prompt_index=1)
    other_request = Row(RowKey("b", 0), 4, prompt_index=0)
    scheduler.submit([one, other_place, other_request])
    scheduler.start_waiting()
    assert [perform(scheduler) for _ in range(6)] == [
        chunk(one, 0, 4),
        Decode((one,)),
        chunk(other_place, 0, 4),
        Decode((one, other_place)),
        chunk(other_request, 0, 4),
        Decode((one, other_place, other_request)),
    ]


def test_outputs_of_a_prompt_of_one_token_need_no_copy():
    scheduler = Scheduler(2, LIMITS)
    scheduler.submit(outputs("a", 0, 2))
    scheduler.start_waiting()
    action = scheduler.next_action()
    assert isinstance(action, Decode)
    assert len(action.rows) == 2


def test_a_chunk_is_asked_for_until_it_is_recorded_with_a_step_after_each_part():
    scheduler = Scheduler(2, LIMITS)
    stream, long = row("stream"), row("long", 4)
    scheduler.submit([stream, long])
    scheduler.start_waiting()
    parts = [scheduler.next_action() for _ in range(5)]
    assert parts == [chunk(long, 0, 4), Decode((stream,))] * 2 + [chunk(long, 0, 4)]
    assert parts[0] is parts[2], "told from a chunk that begins anew"
    scheduler.record_prefill(parts[0])
    assert scheduler.next_action() == Decode((stream, long))


def test_scores_take_turns_with_prompts_and_a_step_follows_each_part():
    scheduler = Scheduler(2, LIMITS)
    stream, long = row("stream"), row("long", 4)
    scheduler.submit([stream, long])
    scheduler.start_waiting()
    scheduler.has_scores = True
    actions = [type(scheduler.next_action()) for _ in range(8)]
    assert actions == [Prefill, Decode, ReadScores, Decode] * 2
    scheduler.remove(stream)
    actions = [type(scheduler.next_action()) for _ in range(4)]
    assert actions == [Prefill, ReadScores] * 2
    scheduler.remove(long)
    assert scheduler.is_pressed
    assert scheduler.next_action() == ReadScores()
    scheduler.has_scores = False
    assert not scheduler.is_pressed
    assert scheduler.next_action() == Idle()


def test_short_prompts_share_a_chunk_and_longer_ones_wait_for_their_own():
    scheduler = Scheduler(5, PrefillLimits(chunk_tokens=8, packed_tokens=6, packed_prompts=3))
    one, long, two, three, four = (
        row(name, n) for name, n in zip("abcde", (2, 20, 3, 2, 1), strict=True)
    )
    scheduler.submit([one, long, two, three, four])
    scheduler.start_waiting()
    # Two, three and one tokens fill the six; the two tokens of the fourth prompt do not fit.
    assert perform(scheduler) == Prefill((Chunk(one, 0, 2), Chunk(two, 0, 3), Chunk(four, 0, 1)))
    scheduler.remove(one)
    scheduler.remove(two)
    scheduler.remove(four)
    assert perform(scheduler) == chunk(long, 0, 8)
    assert perform(scheduler) == chunk(long, 8, 16)
    assert perform(scheduler) == Prefill((Chunk(long, 16, 20), Chunk(three, 0, 2)))


def test_no_more_prompts_share_a_chunk_than_may_and_outputs_of_one_prompt_do_not():
    limits = PrefillLimits(chunk_tokens=8, packed_tokens=8, packed_prompts=2)
    scheduler = Scheduler(4, limits)
    first, second = outputs("a", 1, 2)
    other, another = row("b", 1), row("c", 1)
    scheduler.submit([first, second, other, another])
    scheduler.start_waiting()
    assert [perform(scheduler) for _ in range(4)] == [
        Prefill((Chunk(first, 0, 1), Chunk(other, 0, 1))),
        Copy(first, (second,)),
        # Nothing runs beside it that would have to be waited for.
        Decode((first, second, other)),
        chunk(another, 0, 1),
    ]


def test_a_chunk_begins_anew_if_one_of_its_rows_leaves():
    scheduler = Scheduler(2, PrefillLimits(chunk_tokens=4, packed_tokens=4, packed_prompts=2))
    one, two = row("a", 2), row("b", 2)
    scheduler.submit([one, two])
    scheduler.start_waiting()
    assert scheduler.next_action() == Prefill((Chunk(one, 0, 2), Chunk(two, 0, 2)))
    scheduler.remove(one)
    assert scheduler.next_action() == chunk(two, 0, 2)


def test_a_prompt_with_a_whole_chunk_is_looked_up_once_when_it_is_its_turn():
    scheduler = Scheduler(3, LIMITS, keeps_prefixes=True)
    short, first, second = row("short", 3), row("a", 9), row("b", 8)
    scheduler.submit([short, first, second])
    scheduler.start_waiting()
    assert perform(scheduler) == chunk(short, 0, 3)
    assert scheduler.next_action() == Decode((short,))
    scheduler.remove(short)
    assert scheduler.next_action() == LookUp(first)
    scheduler.record_look_up(first, 0)
    assert [perform(scheduler) for _ in range(3)] == [
        chunk(first, 0, 4),
        chunk(first, 4, 8),
        chunk(first, 8, 9),
    ]
    scheduler.remove(first)
    assert scheduler.next_action() == LookUp(second)
    scheduler.record_look_up(second, 2)
    assert scheduler.next_action() == Decode((second,))


def test_outputs_of_a_prompt_that_was_found_get_a_copy_of_it():
    scheduler = Scheduler(2, LIMITS, keeps_prefixes=True)
    first, second = outputs("a", 4, 2)
    scheduler.submit([first, second])
    scheduler.start_waiting()
    assert scheduler.next_action() == LookUp(first)
    scheduler.record_look_up(first, 1)
    assert perform(scheduler) == Copy(first, (second,))
    assert scheduler.next_action() == Decode((first, second))


def test_a_search_gets_all_its_slots_at_once_and_nobody_passes_it():
    scheduler = Scheduler(4, LIMITS)
    first, second, beams, late = row("a"), row("b"), search("beams", 3), row("late")
    scheduler.submit([first, second, beams, late])
    assert scheduler.start_waiting() == [first, second]
    assert scheduler.num_free_slots == 2
    scheduler.remove(first)
    assert scheduler.start_waiting() == [beams]
    assert len(beams.slots) == 3
    scheduler.remove(second)
    assert scheduler.start_waiting() == [late]
    assert sorted((*beams.slots, *late.slots)) == [0, 1, 2, 3]
    scheduler.remove(beams)
    assert beams.slots == ()
    assert scheduler.num_free_slots == 3


def test_the_prompt_of_a_search_is_prefilled_once_and_spread_at_once():
    scheduler = Scheduler(3, LIMITS)
    stream, beams = row("stream"), search("beams", 2, 6)
    scheduler.submit([stream, beams])
    scheduler.start_waiting()
    actions = [perform(scheduler) for _ in range(6)]
    assert actions == [
        chunk(beams, 0, 4),
        Decode((stream,)),
        chunk(beams, 4, 6),
        Spread(beams),
        Decode((stream,)),
        Search(beams),
    ]


def test_steps_of_searches_take_turns_with_chunks_and_steps_and_each_other():
    scheduler = Scheduler(6, LIMITS)
    beams, other = search("beams", 2), search("other", 2)
    stream, long = row("stream"), row("long", 40)
    scheduler.submit([beams, other, stream, long])
    scheduler.start_waiting()
    kinds = [
        action.row.key.request_id if isinstance(action, Search) else type(action).__name__
        for action in (perform(scheduler) for _ in range(9))
    ]
    assert kinds == [
        "Prefill", "Decode", "beams", "Prefill", "Decode", "other", "Prefill", "Decode", "beams",
    ]  # fmt: skip


def test_a_search_presses_so_that_steps_are_dispatched_one_by_one():
    scheduler = Scheduler(3, LIMITS)
    stream, beams = row("stream"), search("beams", 2)
    scheduler.submit([stream])
    scheduler.start_waiting()
    assert not scheduler.is_pressed
    scheduler.submit([beams])
    scheduler.start_waiting()
    assert scheduler.is_pressed
