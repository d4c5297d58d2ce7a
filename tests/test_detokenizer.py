"""model.detokenizer: what is released is whole characters, and never has to be taken back."""

import codecs
import itertools

import pytest
from hypothesis import example, given, strategies as st

from model.detokenizer import StreamingDetokenizer


def released(pieces: list[bytes], *stop_strings: str) -> list[str]:
    """What each of the tokens 0, 1, 2, … with these bytes releases, and then the end."""
    detokenizer = StreamingDetokenizer(pieces.__getitem__, stop_strings)
    texts = []
    for token_id in range(len(pieces)):
        texts.append(detokenizer.add(token_id))
        if detokenizer.stopped_by is not None:
            break
    return [*texts, detokenizer.finish()]


def test_without_stop_strings_every_token_is_released_at_once():
    assert released([b"Hel", b"lo", b" you"]) == ["Hel", "lo", " you", ""]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"\xc3", b"\xa9"], ["", "é", ""]),
        ([b"\xf0", b"\x9f", b"\x98", b"\x80"], ["", "", "", "😀", ""]),
        ([b"a\xf0\x9f", b"\x98\x80b"], ["a", "😀b", ""]),
        ([b"\xf0\x9f\x98\x80\xc3", b"\xa9"], ["😀", "é", ""]),
    ],
)
def test_a_character_is_released_whole_when_its_last_byte_comes(pieces, expected):
    assert released(pieces) == expected


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"a\xff", b"b"], ["a\ufffd", "b", ""]),
        ([b"\xc3", b"b"], ["", "\ufffdb", ""]),
        ([b"a", b"\xf0\x9f"], ["a", "", "\ufffd"]),
        ([b"\xed\xa0\x80"], ["\ufffd\ufffd\ufffd", ""]),
    ],
)
def test_bytes_that_are_no_character_become_replacement_characters(pieces, expected):
    assert released(pieces) == expected


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        ([b"one.", b"two"], ".", ["one", ""]),
        ([b"aEN", b"Db"], "END", ["a", "", ""]),
        ([b"a", b"E", b"N", b"D"], "END", ["a", "", "", "", ""]),
        ([b"\n", b"\n"], "\n\n", ["", "", ""]),
        ([b"x\xc3", b"\xa9y"], "é", ["x", "", ""]),
        ([b"END"], "END", ["", ""]),
    ],
)
def test_a_stop_string_is_cut_wherever_the_tokens_split_it(pieces, stop, expected):
    assert released(pieces, stop) == expected


def test_the_beginning_of_a_stop_string_is_held_until_it_is_known_not_to_be_one():
    assert released([b"a", b"E", b"N", b"d", b"E"], "END") == ["a", "", "", "ENd", "", "E"]


def test_only_the_part_that_may_still_become_a_stop_string_is_held():
    assert released([b"aa", b"c"], "ab") == ["a", "ac", ""]


def test_the_stop_string_that_stopped_is_told():
    detokenizer = StreamingDetokenizer([b"x;y.z"].__getitem__, [".", ";"])
    assert detokenizer.add(0) == "x"
    assert detokenizer.stopped_by == ";"
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("pieces", [[b"abcd"], [b"a", b"b", b"c", b"d"], [b"ab", b"cd"]])
def test_of_overlapping_stop_strings_the_one_that_is_complete_first_stops(pieces):
    assert "".join(released(pieces, "abcd", "bc")) == "a"


@pytest.mark.parametrize("pieces", [[b"xabc"], [b"x", b"a", b"b", b"c"]])
def test_of_stop_strings_that_end_together_the_longest_stops(pieces):
    detokenizer = StreamingDetokenizer(pieces.__getitem__, ["c", "abc", "bc"])
    text = "".join(detokenizer.add(token_id) for token_id in range(len(pieces)))
    assert (text, detokenizer.stopped_by) == ("x", "abc")


def test_what_matches_while_nothing_may_stop_is_text_for_good():
    detokenizer = StreamingDetokenizer([b"a.", b"b", b"c.d"].__getitem__, ["."])
    assert detokenizer.add(0, may_stop=False) == "a."
    assert detokenizer.add(1) == "b"
    assert detokenizer.add(2) == "c"
    assert detokenizer.stopped_by == "."


def test_the_beginning_of_a_stop_string_that_may_not_stop_is_released():
    detokenizer = StreamingDetokenizer([b"E", b"ND"].__getitem__, ["END"])
    assert detokenizer.add(0, may_stop=False) == "E"
    assert detokenizer.add(1) == "ND"


# Few characters, so that stop strings are met; parts of characters, so that some are broken.
FRAGMENTS = [b"a", b"b", b"ab", b"\xc3", b"\xa9", b"\xc3\xa9", b"\xf0\x9f", b"\x98\x80", b"\xff"]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=24).map(b"".join)
STOPS = st.lists(st.text("abé\ufffd", min_size=1, max_size=4), max_size=3)


@given(text=TEXTS, cuts=st.lists(st.integers(0, 40), max_size=12), stop_strings=STOPS)
@example(text=b"abab", cuts=[], stop_strings=["abab", "ba"])
def test_the_pieces_joined_are_the_whole_text_cut_at_the_first_stop_string(
    text, cuts, stop_strings
):
    whole = text.decode("utf-8", "replace")
    # The first stop string is the one that ends first; of two that end together, the longest.
    stops = [
        (end, len(whole[:end]) - len(stop))
        for end in range(1, len(whole) + 1)
        for stop in stop_strings
        if whole[:end].endswith(stop)
    ]
    expected = whole[: min(stops)[1]] if stops else whole

    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
    assert "".join(released(pieces, *stop_strings)) == expected


@given(text=TEXTS, stop_strings=STOPS)
def test_nothing_is_held_but_the_beginning_of_a_stop_string(text, stop_strings):
    detokenizer = StreamingDetokenizer(lambda token_id: bytes([token_id]), stop_strings)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    known, sent = "", ""
    for byte in text:
        known += decoder.decode(bytes([byte]))
        sent += detokenizer.add(byte)
        if detokenizer.stopped_by is not None:
            return
        held = known.removeprefix(sent)
        assert held == "" or any(stop.startswith(held) for stop in stop_strings)


@given(st.binary(max_size=12), st.binary(max_size=6), st.binary(max_size=6), st.integers(0, 12))
def test_a_fork_goes_on_as_the_first_would_and_neither_touches_the_other(before, after, other, cut):
    pieces = [before[:cut], before[cut:], after, other]
    first = StreamingDetokenizer(pieces.__getitem__, ["ab", "\u00e9"])
    for token_id in (0, 1):
        if first.stopped_by is None:
            first.add(token_id)
    if first.stopped_by is not None:
        return
    twin, third = first.fork(), first.fork()
    third.add(3)
    assert first.add(2) + first.finish() == twin.add(2) + twin.finish()
    assert first.stopped_by == twin.stopped_by
