"""service.worker.drain_rate, on a clock that the test moves; and what admission makes of it."""

import pytest

from service.worker.admission import Refusal
from service.worker.drain_rate import DrainRate
from tests.test_loop import NUM_SLOTS, Worker, generate


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rate(clock: Clock) -> DrainRate:
    """A queue that somebody waits in from now on."""
    rate = DrainRate(clock)
    rate.set_waiting(True)
    return rate


def leave(rate: DrainRate, clock: Clock, times: int, *, seconds: float, tokens: int) -> None:
    """One request after another, so many seconds apart, each with so many tokens."""
    for _ in range(times):
        clock.now += seconds
        rate.left(1, tokens)


def test_a_second_is_promised_while_nothing_is_known(rate, clock):
    assert rate.seconds_until_left(1, 0) == 1
    clock.now += 1000
    assert rate.seconds_until_left(256, 262_144) == 1


def test_a_request_every_four_seconds_makes_ten_requests_forty_seconds(rate, clock):
    leave(rate, clock, 10, seconds=4, tokens=1)
    # Not 40 to the last digit: the newest of the ten counts in full, a moment ago a little less.
    assert rate.seconds_until_left(10, 0) == pytest.approx(40, abs=2)
    assert rate.seconds_until_left(1, 0) == pytest.approx(4, abs=1)


def test_room_for_many_tokens_takes_longer_than_room_for_one_request(rate, clock):
    leave(rate, clock, 20, seconds=1, tokens=100)
    assert rate.seconds_until_left(1, 0) == 1
    assert rate.seconds_until_left(1, 2000) == pytest.approx(20, abs=1)


def test_the_promise_is_a_whole_number_of_one_to_six_hundred_seconds(rate, clock):
    leave(rate, clock, 5, seconds=0.001, tokens=1000)
    assert rate.seconds_until_left(1, 1) == 1
    clock.now += 3000
    assert rate.seconds_until_left(65_536, 16_777_216) == 600
    assert isinstance(rate.seconds_until_left(2, 2), int)


def test_time_in_which_nobody_waits_does_not_count(rate, clock):
    leave(rate, clock, 10, seconds=2, tokens=1)
    before = rate.seconds_until_left(10, 0)
    rate.set_waiting(False)
    clock.now += 10_000
    rate.set_waiting(True)
    assert rate.seconds_until_left(10, 0) == before


def test_a_queue_that_stands_still_promises_more_and_more(rate, clock):
    leave(rate, clock, 10, seconds=0.1, tokens=1)
    promises = []
    for _ in range(5):
        clock.now += 30
        promises.append(rate.seconds_until_left(10, 0))
    assert promises == sorted(set(promises))
    assert promises[0] >= 30


def test_what_happened_lately_counts_and_what_happened_long_ago_does_not(rate, clock):
    leave(rate, clock, 100, seconds=0.1, tokens=1)
    leave(rate, clock, 50, seconds=10, tokens=1)
    assert rate.seconds_until_left(1, 0) == pytest.approx(10, abs=1)
    leave(rate, clock, 6000, seconds=0.1, tokens=1)
    assert rate.seconds_until_left(10, 0) == pytest.approx(1, abs=1)


def refusal_of(worker: Worker, name: str, num_tokens: int) -> int | None:
    with pytest.raises(Refusal) as refusal:
        worker.admission.admit(generate(name, (1,) * num_tokens))
    assert refusal.value.failed.code == "queue_full"
    return refusal.value.failed.retry_after_seconds


def slow_worker(clock: Clock, **bounds: int) -> Worker:
    """All slots are taken. In 30 seconds of ``clock`` eight requests with 16 tokens got theirs."""
    worker = Worker(**bounds)
    worker.admission._drain_rate = DrainRate(clock)
    worker.submit(generate("runs", (1,), n=NUM_SLOTS - 1, max_tokens=60))
    worker.turn()
    for number in range(6):
        worker.submit(generate(str(number), (1, 2), max_tokens=1))
        clock.now += 5
        while str(number) in worker.open:
            worker.turn()
    worker.submit(generate("last", (1,), max_tokens=60))
    worker.turn()
    return worker


def test_a_refusal_says_when_there_is_room_for_one_more_request(clock):
    worker = slow_worker(clock, max_requests=2)
    worker.submit(generate("a", (1, 2)))
    worker.submit(generate("b", (1, 2)))
    # One has to leave: 30 s / 8 are 3.75.
    assert refusal_of(worker, "c", 2) == 4


def test_a_refusal_says_when_there_is_room_for_all_its_tokens(clock):
    worker = slow_worker(clock, max_tokens=10)
    worker.submit(generate("a", (1,) * 8))
    # 30 s / 16 are 1.9 a token. All eight have to leave for ten, and for more no more can.
    assert refusal_of(worker, "b", 10) == pytest.approx(15, abs=1)
    assert refusal_of(worker, "c", 20) == pytest.approx(15, abs=1)
    # For three, one has to.
    assert refusal_of(worker, "d", 3) == 2
