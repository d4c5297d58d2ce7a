"""How long a turn of the loop is: in numbers, and for a long prompt beside running streams."""

import pytest

from service.worker.actions import Chunk, Prefill, Row, RowKey
from service.worker.pace import Pace
from service.worker.paused_prefill import PausedPrefill


def paced(step_seconds):
    pace = Pace()
    pace.note_steps(4, 4 * step_seconds)
    return pace


@pytest.mark.parametrize(
    ("step_seconds", "most", "num_steps"),
    [(0.001, 100, 8), (0.02, 100, 4), (0.02, 3, 3), (0.03, 100, 2), (0.05, 100, 1), (2.0, 100, 1)],
)
def test_a_dispatch_holds_what_fits_in_80_ms_and_at_most_eight(step_seconds, most, num_steps):
    assert paced(step_seconds).num_steps(most) == num_steps


def test_the_first_dispatch_is_one_step():
    assert Pace().num_steps(100) == 1


def test_a_step_is_smoothed_over_about_ten():
    pace = paced(0.1)
    pace.note_steps(1, 0.2)
    assert pace.prefill_seconds(is_accompanied=True) == pytest.approx(1.9 * 0.11)


def test_a_prompt_gets_almost_two_steps_beside_streams_and_pauses_for_arrivals_alone():
    assert paced(0.05).prefill_seconds(is_accompanied=True) == pytest.approx(0.095)
    assert paced(0.5).prefill_seconds(is_accompanied=False) == 0.1
    assert Pace().prefill_seconds(is_accompanied=True) == 0.1


class Layers:
    """An engine whose chunks have 18 layers, each as long as it is told."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.now = 100.0
        self.num_done = 0
        self.num_begun = 0

    def prefill(self, chunks):
        self.num_begun += 1
        for _ in range(18):
            self.now += self.seconds
            self.num_done += 1
            yield


def run_parts(layers, budget, action=None):
    """Runs a chunk to its end; how many layers each part had."""
    paused = PausedPrefill(layers, clock=lambda: layers.now)
    action = action or Prefill((Chunk(Row(RowKey("a", 0), 9), 0, 9),))
    counts = []
    is_done = False
    while not is_done:
        before = layers.num_done
        is_done = paused.run(action, [], layers.now + budget)
        counts.append(layers.num_done - before)
    return counts


def test_a_part_ends_before_the_layer_that_would_not_fit():
    # Five layers of 21 ms are 105, six would be 126.
    assert run_parts(Layers(0.021), 0.116) == [5, 5, 5, 3]


def test_a_layer_longer_than_a_part_is_a_part():
    assert run_parts(Layers(0.5), 0.116) == [1] * 18 + [0]


def test_another_chunk_begins_anew_and_the_same_one_goes_on():
    layers = Layers(0.021)
    paused = PausedPrefill(layers, clock=lambda: layers.now)
    one, other = (Prefill((Chunk(Row(RowKey(name, 0), 9), 0, 9),)) for name in "ab")
    for action in (one, one, other, one):
        assert not paused.run(action, [], layers.now + 0.05)
    assert layers.num_begun == 3


def test_f_r4_a_stream_waits_three_steps_at_most_while_a_long_prompt_is_prefilled():
    step = 0.058
    for layer_seconds in (0.007, 0.01, 0.021, 0.05, 0.11):
        layers = Layers(layer_seconds)
        budget = paced(step).prefill_seconds(is_accompanied=True)
        longest = max(run_parts(layers, budget)) * layer_seconds
        assert longest + step <= 3 * step
        # And the prompt gets its share: all but less than one layer.
        assert longest > 1.9 * step - layer_seconds
