"""A job from its command to its version, on the real engine: rows, plan, steps, checkpoints."""

import queue
import time

import pytest

from service.protocol.training import (
    ChatMessage,
    ChatRow,
    IdsRow,
    JobEnded,
    JobEval,
    JobPrepared,
    JobStep,
    JobVersion,
    PromptRow,
    StartJob,
    TextRow,
)
from service.worker.adapter_store import AdapterStore
from service.worker.pace import Pace
from service.worker.training_plan import MAX_STEPS
from service.worker.training_room import TrainingRoom
from service.worker.work_done import WorkDone
from tests.worker_process import prepare

ROWS = (
    TextRow("The lamp is green."),
    PromptRow("The keeper of the lamp is", " Tove."),
    ChatRow((ChatMessage("user", "Who keeps it?"), ChatMessage("assistant", "Tove."))),
    IdsRow(tuple(range(20, 60))),
)


class Room:
    """A `TrainingRoom` whose loop is this thread."""

    def __init__(self, engine):
        self.events = []
        self.store = AdapterStore()
        self._arrivals = queue.SimpleQueue()
        self._room = TrainingRoom(
            engine, self.store, self._arrivals.put, self.events.extend,
            WorkDone(engine.info.buckets), train_share=0.4, checkpoint_seconds=0.0,
        )  # fmt: skip

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    def train(self, command, folder):
        self._room.take(command)
        self._turn_until(JobPrepared)
        self._room.take(StartJob(command.job_id, str(folder), 2, MAX_STEPS))
        self._turn_until(JobEnded)

    def _turn_until(self, kind):
        deadline = time.monotonic() + 60
        while not self.of(kind):
            assert time.monotonic() < deadline, self.events
            while not self._arrivals.empty():
                self.events += self._room.turns.take(self._arrivals.get())
            if self._room.turns.has_work:
                self.events += self._room.turns.train(
                    Pace(), has_others=False, is_accompanied=False
                )
            else:
                time.sleep(0.001)


@pytest.mark.parametrize("layout", ["keras", "peft"])
def test_a_job_of_texts_learns_and_its_versions_can_be_used(engine_of, tmp_path, layout):
    engine = engine_of("gemma3_tiny")
    room = Room(engine)
    form = type(prepare("x").hyperparameters.form)(layout, 4, 4.0, ("query", "value"))
    command = prepare(
        "a", *ROWS, form=form, steps=20, learning_rate=0.01, max_length=64,
        validation=(TextRow("The lamp is green."),),
    )  # fmt: skip
    room.train(command, tmp_path / "a")
    assert [(each.end, each.code) for each in room.of(JobEnded)] == [("succeeded", None)]
    [prepared] = room.of(JobPrepared)
    steps = room.of(JobStep)
    assert [each.step for each in steps] == list(range(1, prepared.num_steps + 1))
    assert sum(each.num_tokens for each in steps) == prepared.num_tokens
    assert 128 * 20 <= prepared.num_padded_tokens <= 2 * 128 * 20
    assert prepared.seconds > 0
    measured = room.of(JobEval)
    assert [each.step for each in measured] == [*range(0, 20, 2), 20]
    assert measured[-1].valid_loss < 0.8 * measured[0].valid_loss
    versions = room.of(JobVersion)
    assert [each.step for each in versions] == list(range(2, 21, 2))
    assert [each.is_last for each in versions] == [False] * 9 + [True]
    for version in versions[::9]:
        content = room.store.content(version.digest)
        assert engine.open_adapter(content).rank == 4
        assert engine.adapter_form(content).layout == layout
