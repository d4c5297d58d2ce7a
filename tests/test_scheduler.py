"""service.worker.scheduler by example; `test_scheduler_states` tries every order of calls."""

from service.worker.scheduler import Action, Copy, Decode, Idle, Prefill, Row, RowKey, Scheduler


def row(name: str, num_prefill_tokens: int = 0) -> Row:
    return Row(RowKey(name, 0), num_prefill_tokens)


def outputs(name: str, num_prefill_tokens: int, num_outputs: int) -> list[Row]:
    """The outputs of one prompt."""
    return [Row(RowKey(name, k), num_prefill_tokens) for k in range(num_outputs)]


def perform(scheduler: Scheduler) -> Action:
    """The next action, recorded as done."""
    action = scheduler.next_action()
    if isinstance(action, Prefill):
        scheduler.record_prefill(action)
    elif isinstance(action, Copy):
        scheduler.record_copy(action)
    return action


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


def test_outputs_of_one_prompt_prefill_it_once_and_start_together():
    scheduler = Scheduler(num_slots=3, chunk_tokens=4)
    first, second, third = outputs("a", 6, 3)
    scheduler.submit([first, second, third])
    scheduler.start_waiting()
    assert [perform(scheduler) for _ in range(4)] == [
        Prefill(first, 0, 4),
        Prefill(first, 4, 6),
        Copy(first, (second, third)),
        Decode((first, second, third)),
    ]


def test_a_copy_takes_no_turn_of_a_running_stream():
    scheduler = Scheduler(num_slots=3, chunk_tokens=4)
    stream = row("stream")
    first, second = outputs("a", 8, 2)
    scheduler.submit([stream, first, second])
    scheduler.start_waiting()
    assert [perform(scheduler) for _ in range(5)] == [
        Prefill(first, 0, 4),
        Decode((stream,)),
        Prefill(first, 4, 8),
        Copy(first, (second,)),
        Decode((stream, first, second)),
    ]


def test_an_output_that_gets_a_slot_once_the_first_one_decodes_prefills_for_itself():
    scheduler = Scheduler(num_slots=2, chunk_tokens=4)
    stream = row("stream")
    first, second = outputs("a", 4, 2)
    scheduler.submit([stream, first, second])
    scheduler.start_waiting()
    assert [perform(scheduler) for _ in range(2)] == [Prefill(first, 0, 4), Decode((stream, first))]
    scheduler.remove(stream)
    assert scheduler.start_waiting() == [second]
    assert [perform(scheduler) for _ in range(2)] == [
        Prefill(second, 0, 4),
        Decode((first, second)),
    ]


def test_an_output_that_gets_a_slot_just_before_the_first_one_decodes_is_copied_to():
    scheduler = Scheduler(num_slots=2, chunk_tokens=4)
    stream = row("stream")
    first, second = outputs("a", 4, 2)
    scheduler.submit([stream, first, second])
    scheduler.start_waiting()
    assert perform(scheduler) == Prefill(first, 0, 4)
    scheduler.remove(stream)
    scheduler.start_waiting()
    assert perform(scheduler) == Copy(first, (second,))


def test_if_the_output_that_prefills_leaves_the_next_one_begins_anew():
    scheduler = Scheduler(num_slots=3, chunk_tokens=4)
    first, second, third = outputs("a", 8, 3)
    scheduler.submit([first, second, third])
    scheduler.start_waiting()
    assert perform(scheduler) == Prefill(first, 0, 4)
    scheduler.remove(first)
    assert [perform(scheduler) for _ in range(3)] == [
        Prefill(second, 0, 4),
        Prefill(second, 4, 8),
        Copy(second, (third,)),
    ]


def test_if_the_output_to_copy_from_leaves_the_next_one_begins_anew():
    scheduler = Scheduler(num_slots=2, chunk_tokens=4)
    first, second = outputs("a", 4, 2)
    scheduler.submit([first, second])
    scheduler.start_waiting()
    assert perform(scheduler) == Prefill(first, 0, 4)
    scheduler.remove(first)
    assert perform(scheduler) == Prefill(second, 0, 4)


def test_equal_prompts_of_other_requests_and_of_other_places_are_not_copied():
    scheduler = Scheduler(num_slots=3, chunk_tokens=4)
    one = Row(RowKey("a", 0), 4, prompt_index=0)
    other_place = Row(RowKey("a", 1), 4, prompt_index=1)
    other_request = Row(RowKey("b", 0), 4, prompt_index=0)
    scheduler.submit([one, other_place, other_request])
    scheduler.start_waiting()
    assert [perform(scheduler) for _ in range(6)] == [
        Prefill(one, 0, 4),
        Decode((one,)),
        Prefill(other_place, 0, 4),
        Decode((one, other_place)),
        Prefill(other_request, 0, 4),
        Decode((one, other_place, other_request)),
    ]


def test_outputs_of_a_prompt_of_one_token_need_no_copy():
    scheduler = Scheduler(num_slots=2, chunk_tokens=4)
    scheduler.submit(outputs("a", 0, 2))
    scheduler.start_waiting()
    action = scheduler.next_action()
    assert isinstance(action, Decode)
    assert len(action.rows) == 2
