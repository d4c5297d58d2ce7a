"""service.worker.score_line: what is read together, in which slot and when."""

from hypothesis import given, strategies as st

from service.worker.actions import RowKey
from service.worker.scheduler import PrefillLimits
from service.worker.score_line import Passage, ScoreLine, ScorePiece

LIMITS = PrefillLimits(chunk_tokens=16, packed_tokens=8, packed_prompts=4)


def passage(name, *sizes, tenant="default", priority=0):
    """Pieces of these sizes, one behind another."""
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    pieces = tuple(
        ScorePiece((1,) * size, start) for size, start in zip(sizes, starts, strict=True)
    )
    return Passage(RowKey(name, 0), pieces, tenant, priority)


def line(*passages, num_slots=3):
    made = ScoreLine(num_slots, LIMITS)
    made.submit(passages)
    return made


def read_all(made):
    """Name, slot and size of the pieces of each chunk."""
    chunks = []
    while made.has_work:
        reading = made.next_reading()
        chunks.append(
            [(p.key.request_id, slot, len(piece.token_ids)) for p, slot, piece in reading.pieces]
        )
        made.record_reading(reading)
    return chunks


def test_short_passages_share_a_chunk_and_its_slot_in_the_order_of_their_arrival():
    made = line(passage("a", 2, 1), passage("b", 3), passage("c", 4), passage("d", 1))
    assert read_all(made) == [
        [("a", 0, 2), ("a", 0, 1), ("b", 0, 3)],
        [("c", 0, 4), ("d", 0, 1)],
    ]


def test_a_chunk_has_no_more_pieces_than_it_may():
    made = line(*[passage(str(number), 1) for number in range(5)])
    assert [len(chunk) for chunk in read_all(made)] == [4, 1]


def test_a_context_is_read_alone_and_its_continuations_share_a_chunk_with_others():
    made = line(passage("a", 12, 1, 2), passage("b", 16, 1), passage("c", 3))
    assert read_all(made) == [
        [("c", 0, 3)],
        [("a", 1, 12)],
        [("b", 2, 16)],
        [("a", 1, 1), ("a", 1, 2), ("b", 2, 1)],
    ]


def test_long_passages_take_turns_with_short_ones_and_with_each_other():
    made = line(passage("long", 16, 16, 16), passage("other", 16, 16), num_slots=3)
    chunks = []
    for number in range(4):
        made.submit([passage(f"short {number}", 8)])
        for _ in range(2):
            reading = made.next_reading()
            chunks += [placed.passage.key.request_id for placed in reading.pieces]
            made.record_reading(reading)
    assert chunks[::2] == [f"short {number}" for number in range(4)]
    assert chunks[1::2] == ["long", "other", "long", "other"]


def test_no_more_passages_are_half_read_than_there_are_slots():
    made = line(*[passage(name, 16, 16) for name in "abc"], num_slots=3)
    assert [chunk[0][:2] for chunk in read_all(made)] == [
        ("a", 1), ("b", 2), ("a", 1), ("b", 2), ("c", 1), ("c", 1),
    ]  # fmt: skip


def test_who_is_next_among_short_ones_is_told_by_priority_and_then_by_tenant():
    made = line(
        passage("a1", 8, tenant="a"),
        passage("a2", 8, tenant="a"),
        passage("b1", 8, tenant="b"),
        passage("urgent", 8, priority=1),
    )
    assert [chunk[0][0] for chunk in read_all(made)] == ["urgent", "a1", "b1", "a2"]


def test_a_passage_that_is_removed_gives_its_slot_to_the_next():
    first, second, third = (passage(name, 16, 16) for name in "abc")
    made = line(first, second, third, num_slots=2)
    reading = made.next_reading()
    made.remove(first)
    made.remove(first)
    made.remove(second)
    made.record_reading(reading)
    assert read_all(made) == [[("c", 1, 16)], [("c", 1, 16)]]


@given(
    st.lists(
        st.lists(st.integers(1, 16), min_size=1, max_size=5),
        min_size=1,
        max_size=12,
    ),
    st.integers(2, 4),
)
def test_every_piece_is_read_once_in_order_and_where_what_precedes_it_stands(sizes, num_slots):
    passages = [passage(str(number), *each) for number, each in enumerate(sizes)]
    made = line(*passages, num_slots=num_slots)
    read = {each.key: [] for each in passages}
    # Who wrote last into each slot, and to where.
    held = {}
    while made.has_work:
        reading = made.next_reading()
        total = sum(len(placed.piece.token_ids) for placed in reading.pieces)
        assert len(reading.pieces) == 1 or total <= LIMITS.packed_tokens
        assert 1 <= len(reading.pieces) <= LIMITS.packed_prompts
        for of, slot, piece in reading.pieces:
            if piece.start:
                assert held[slot] == (of.key, piece.start)
            held[slot] = (of.key, piece.start + len(piece.token_ids))
            read[of.key].append(piece)
        made.record_reading(reading)
    assert read == {each.key: list(each.pieces) for each in passages}
