"""The self-test finds one unit in the last place of one row of a search."""

import jax.numpy as jnp
import numpy as np
import pytest

from model.errors import SelfTestFailed
from model.search_self_test import compare_searches
from model.search_slots import Choice, Extension
from model.self_test import compare_bits
from model.slots import EngineInfo, SampledToken


class Tape:
    """An engine of products: a row's answer is its token times its position, and stays in its slot.

    What disturbs it sees how many rows run together, the place among them and the value.
    """

    def __init__(self, num_slots=8):
        programs = [rows for rows in (4, 8) if num_slots > 1 and (rows == 4 or num_slots > 4)]
        self.info = EngineInfo(
            preset="x", preset_digest="x", family="x", is_instruct=None, num_parameters=0,
            dtype="x", backend="paper", device="tape", kernels="", context_tokens=100,
            num_slots=num_slots, vocabulary_size=1000, num_layers=1, hidden_dim=1,
            chunk_tokens=256, buckets={"search_rows": programs},
        )  # fmt: skip
        self.tokens = [(3 * slot + 1, 40 + slot) for slot in range(min(num_slots, 8))]
        self.answers = [np.float32(token * position) for position, token in self.tokens]
        self.kept = []
        self.runs = []
        self.disturb_key = lambda count, place, x: x
        self.disturb_beam = self.disturb_candidate = self.disturb_row = lambda count, place, x: x

    @property
    def found(self):
        """What decode steps found."""
        return [self.sampled(answer) for answer in self.answers]

    @staticmethod
    def sampled(answer):
        return SampledToken(7, -1.0, ((7, float(answer)), (8, -1.0)))

    def keys_and_values(self, slot, position):
        assert position == self.tokens[slot][0]
        return np.full((1, 1, 1), self.answers[slot], np.float32)

    def step_beams(self, step):
        [beam] = step.beams
        answer = self.disturb_beam(1, 0, np.float32(beam.token_id * step.position))
        self.answers[beam.slot] = self.disturb_key(1, 0, self.answers[beam.slot])
        return [Extension(0, beam, self.sampled(answer))]

    def keep_hidden(self, slot):
        self.kept.append(slot)

    def drop_hidden(self, slot):
        self.kept.remove(slot)

    def step_candidates(self, step):
        [slot], [token_id] = step.slots, step.token_ids
        assert self.kept == [slot]
        answer = self.disturb_candidate(1, 0, np.float32(token_id * step.position))
        return Choice(0, (self.sampled(answer),), (1.0,))

    def search_rows(self, slots, token_ids, positions):
        self.runs.append(tuple(slots))
        products = np.array(token_ids, np.float32) * np.array(positions, np.float32)
        rows = [self.disturb_row(len(slots), *pair) for pair in enumerate(products)]
        return np.array(rows, np.float32)[:, None]


def only_where(condition):
    """One unit in the last place, where the condition on count and place holds."""
    return lambda count, place, value: (
        np.nextafter(value, np.float32(np.inf)) if condition(count, place) else value
    )


@pytest.mark.parametrize(
    ("num_slots", "num_comparisons"),
    # Beams and a candidate against steps, then rows together.
    [(2, 3 + 2), (3, 4 + 3), (4, 5 + 3 + 4), (8, 9 + 3 + 4 + 7 + 8), (64, 31)],
)
def test_searches_that_multiply_as_steps_do_pass(num_slots, num_comparisons):
    tape = Tape(num_slots)
    assert compare_searches(tape, tape.tokens, tape.found) == num_comparisons
    assert tape.kept == []
    assert [len(run) for run in tape.runs if len(run) > 1] == {
        2: [2], 3: [3], 4: [3, 4], 8: [3, 4, 7, 8], 64: [3, 4, 7, 8],
    }[num_slots]  # fmt: skip


@pytest.mark.parametrize("what", ["disturb_beam", "disturb_candidate", "disturb_key"])
def test_one_unit_between_a_search_and_a_step_is_found(what):
    tape = Tape()
    setattr(tape, what, only_where(lambda count, place: True))
    with pytest.raises(
        SelfTestFailed, match=r"search .* than a decode step .*--slots 1,"
    ) as failed:
        compare_searches(tape, tape.tokens, tape.found)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(("count", "num_slots"), [(3, 1), (4, 1), (7, 4), (8, 4)])
def test_one_unit_in_one_row_of_a_search_is_found(count, num_slots):
    tape = Tape()
    tape.disturb_row = only_where(lambda rows, place: (rows, place) == (count, 1))
    message = rf"search gets other bits among {count} \(at place 1\) .*--slots {num_slots},"
    with pytest.raises(SelfTestFailed, match=message):
        compare_searches(tape, tape.tokens, tape.found)


def test_one_unit_in_one_row_of_a_compiled_search_is_found(engine_of, monkeypatch):
    engine = engine_of("gemma3_tiny")
    program = engine._programs["advance[4]"]

    def uneven(*arguments):
        rows = program(*arguments)
        logits = np.array(rows.logits)
        logits[2, 40] = np.nextafter(logits[2, 40], np.float32(np.inf))
        return rows._replace(logits=jnp.asarray(logits))

    monkeypatch.setitem(engine._programs, "advance[4]", uneven)
    with pytest.raises(SelfTestFailed, match=r"among 3 \(at place 2\).*--slots 1"):
        compare_bits(engine)
