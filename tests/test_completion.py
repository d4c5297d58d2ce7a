"""service.worker.completion: when an output ends, why, and what may be sent of it.

Texts are those of the arithmetic engine: token 12 is " 12", token 999 is eos, bos and eos are
nothing.
"""

import pytest

from model.slots import DecodeRow, RowRules, SampledToken, Sampling
from service.protocol.messages import (
    OutputEnd,
    Piece,
    StopRules,
    TokenLogprob,
    TokenLogprobs,
)
from service.worker.actions import Row, RowKey
from service.worker.completion import Completion
from tests.fakes.arithmetic_engine import NumberCodec

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)


def completion(
    *strings: str,
    max_tokens: int = 100,
    min_tokens: int = 0,
    stop_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
) -> Completion:
    return Completion(
        row=Row(RowKey("r", 3), num_prefill_tokens=2, slot=5),
        prompt=(0, 7, 8),
        sampling=GREEDY,
        stop=StopRules(max_tokens, min_tokens, strings, stop_ids, ignore_eos),
        num_logprobs=None,
        codec=NumberCodec(),
    )


def texts(subject: Completion, *token_ids: int) -> list[str]:
    """What each token makes safe to send."""
    return [subject.take([SampledToken(token_id)]).piece.text for token_id in token_ids]


def test_each_token_is_a_piece_of_its_output():
    step = completion().take([SampledToken(12)])
    assert step.piece == Piece("r", 3, (12,), " 12", ())
    assert step.end is None


def test_the_last_prompt_token_decodes_first_and_then_each_new_one():
    subject = completion(max_tokens=6, min_tokens=1, stop_ids=(50,))
    rules = RowRules(GREEDY, num_prompt=3, end=9, stop_ids=(50, 999), may_stop_at=4)
    assert subject.decode_row(1) == DecodeRow(slot=5, position=2, rules=rules)
    # The next dispatch starts before the last one is read.
    assert subject.decode_row(3) == DecodeRow(slot=5, position=3, rules=rules)
    assert subject.num_steps_left == 2
    assert subject.decode_row(8).position == 6
    assert subject.num_steps_left == 0


def test_the_tokens_of_a_dispatch_are_one_piece_up_to_the_one_that_ends_it():
    subject = completion("34")
    step = subject.take([SampledToken(id_) for id_ in (1, 2, 34, 5)])
    assert step.piece == Piece("r", 3, (1, 2, 34), " 1 2 ", ())
    assert step.end == OutputEnd("stop", "34", num_tokens=3)


def test_text_that_may_become_a_stop_string_is_known():
    subject = completion("3 4")
    subject.take([SampledToken(2)])
    assert not subject.may_be_stopping
    subject.take([SampledToken(3)])
    assert subject.may_be_stopping
    subject.take([SampledToken(5)])
    assert not subject.may_be_stopping


def test_max_tokens_ends_with_length_at_exactly_that_token():
    subject = completion(max_tokens=2)
    assert texts(subject, 1) == [" 1"]
    assert subject.end is None
    assert texts(subject, 2) == [" 2"]
    assert subject.end == OutputEnd("length", None, num_tokens=2)


def test_eos_ends_the_output_and_is_counted_and_sent_but_is_no_text():
    subject = completion()
    texts(subject, 1)
    step = subject.take([SampledToken(999)])
    assert step.piece == Piece("r", 3, (999,), "", ())
    assert step.end == OutputEnd("stop", 999, num_tokens=2)


def test_a_stop_id_is_no_text_although_its_piece_has_some():
    subject = completion(stop_ids=(50,))
    assert texts(subject, 1, 50) == [" 1", ""]
    assert subject.end == OutputEnd("stop", 50, num_tokens=2)


def test_ignore_eos_goes_on_past_eos_but_not_past_a_stop_id_or_a_stop_string():
    subject = completion(ignore_eos=True, stop_ids=(50,))
    assert texts(subject, 999, 1, 50) == ["", " 1", ""]
    assert subject.end == OutputEnd("stop", 50, num_tokens=3)

    subject = completion("2", ignore_eos=True)
    assert texts(subject, 999, 2) == ["", " "]
    assert subject.end == OutputEnd("stop", "2", num_tokens=2)


def test_eos_named_as_a_stop_id_stops_even_if_eos_is_ignored():
    subject = completion(ignore_eos=True, stop_ids=(999,))
    texts(subject, 999)
    assert subject.end == OutputEnd("stop", 999, num_tokens=1)


def test_a_stop_string_over_a_token_border_is_cut_and_its_tokens_count():
    subject = completion("2 3")
    assert texts(subject, 12, 34) == [" 1", ""]
    assert subject.end == OutputEnd("stop", "2 3", num_tokens=2)


def test_the_beginning_of_a_stop_string_is_held_back_and_released_with_the_next_token():
    subject = completion("2 3")
    assert texts(subject, 12, 45) == [" 1", "2 45"]
    assert subject.end is None


def test_held_text_is_released_with_the_last_token():
    subject = completion("2 3", max_tokens=1)
    assert texts(subject, 12) == [" 12"]
    assert subject.end == OutputEnd("length", None, num_tokens=1)


def test_held_text_is_released_when_a_stop_id_ends_the_output():
    subject = completion("2 3")
    assert texts(subject, 12, 999) == [" 1", "2"]
    assert subject.end == OutputEnd("stop", 999, num_tokens=2)


def test_held_text_is_released_when_the_output_is_cut_from_outside():
    subject = completion("2 3")
    texts(subject, 12)
    assert subject.cut("cancelled") == Piece("r", 3, (), "2", ())
    assert subject.end == OutputEnd("cancelled", None, num_tokens=1)


def test_a_stop_string_in_the_last_token_stops_and_is_not_length():
    subject = completion("2", max_tokens=1)
    assert texts(subject, 12) == [" 1"]
    assert subject.end == OutputEnd("stop", "2", num_tokens=1)


def test_until_min_tokens_the_ids_that_stop_must_not_be_drawn():
    rules = completion(min_tokens=2, stop_ids=(50,)).decode_row(1).rules
    assert (rules.stop_ids, rules.may_stop_at) == ((50, 999), 5)


def test_ignored_eos_may_be_drawn_before_min_tokens():
    assert completion(min_tokens=2, ignore_eos=True).decode_row(1).rules.stop_ids == ()


def test_a_stop_string_before_min_tokens_is_text_and_the_next_one_stops():
    subject = completion("2", min_tokens=2)
    assert texts(subject, 2, 32) == [" 2", " 3"]
    assert subject.end == OutputEnd("stop", "2", num_tokens=2)


@pytest.mark.parametrize("reason", ["timeout", "cancelled"])
def test_an_output_without_a_token_can_be_cut(reason):
    subject = completion()
    assert subject.cut(reason) == Piece("r", 3, (), "", ())
    assert subject.end == OutputEnd(reason, None, num_tokens=0)


def test_nothing_follows_the_end():
    subject = completion(max_tokens=1)
    texts(subject, 1)
    with pytest.raises(AssertionError, match="after the end"):
        subject.take([SampledToken(2)])
    with pytest.raises(AssertionError, match="ended twice"):
        subject.cut("timeout")


def test_logprobs_come_with_their_token_as_the_vocabulary_writes_it():
    step = completion().take([SampledToken(12, -0.5, ((12, -0.5), (999, -2.0)))])
    twelve = TokenLogprob(12, " 12", (32, 49, 50), -0.5)
    eos = TokenLogprob(999, " 999", (), -2.0)
    assert step.piece.logprobs == (TokenLogprobs(chosen=twelve, top=(twelve, eos)),)


def test_a_fork_has_the_same_past_and_a_future_of_its_own():
    subject = completion(" 13 14", max_tokens=3)
    assert texts(subject, 12, 13) == [" 12", ""]
    twin = subject.fork()
    assert texts(twin, 14) == [""]
    assert texts(subject, 15) == [" 13 15"]
    assert twin.end == OutputEnd("stop", " 13 14", 3)
    assert subject.end == OutputEnd("length", None, 3)


def test_an_end_is_banned_behind_fewer_than_min_tokens():
    subject = completion(min_tokens=2, stop_ids=(5,))
    assert [subject.banned_ids(count) for count in (0, 1, 2, 3)] == [(5, 999), (5, 999), (), ()]
