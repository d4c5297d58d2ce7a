"""Server-sent events are read right in whatever pieces they come."""

import pytest

from service.client.event_stream import Event, EventReader

RECORDED = (
    'event: start\nid: 0\ndata: {"id":"gen_1","prompt_tokens":[2]}\n\n'
    ": ping\n\n"
    'event: token\nid: 1\ndata: {"text":" é: ","token_ids":[7,8]}\n\n'
    "event: done\nid: 2\ndata: {}\n\n"
).encode()
EVENTS = [
    Event("start", '{"id":"gen_1","prompt_tokens":[2]}', "0"),
    Event("token", '{"text":" é: ","token_ids":[7,8]}', "1"),
    Event("done", "{}", "2"),
]


def read(text: bytes, size: int) -> list[Event]:
    reader = EventReader()
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    return [event for piece in pieces for event in reader.feed(piece)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, len(RECORDED)])
def test_events_are_the_same_in_whatever_pieces_they_come(size):
    assert read(RECORDED, size) == EVENTS


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, len(RECORDED)])
def test_lines_may_end_as_the_standard_allows(size):
    assert read(RECORDED.replace(b"\n", b"\r\n"), size) == EVENTS


@pytest.mark.parametrize(
    ("text", "events"),
    [
        (b"data: a\ndata:b\n\n", [Event("message", "a\nb")]),
        (b"event: token\n\n", []),
        (b"retry: 3\ndata:  x\n\n", [Event("message", " x")]),
        (b"event: token\ndata: cut of", []),
        (b"event: token\ndata: cut off\n", []),
        (b"event: a\n\ndata: not of a\n\n", [Event("message", "not of a")]),
    ],
    ids=["joined", "no data", "other field", "half a line", "half an event", "two events"],
)
def test_an_event_is_what_stands_between_empty_lines(text, events):
    assert read(text, len(text)) == read(text, 1) == events
