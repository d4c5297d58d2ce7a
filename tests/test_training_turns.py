"""Slices of training between steps of others: turns of the loop, in this process, on integers."""

import queue
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest

from model.slots import EngineOptions
from model.training import TrainingPlan, TrainingRow
from service.protocol.messages import Finished
from service.protocol.training import CancelJob, JobEnded, JobStep, StartJob
from service.worker.actions import Decode, Idle, Prefill, ReadScores, Row, RowKey, Train
from service.worker.adapter_desk import AdapterDesk
from service.worker.adapter_store import AdapterStore
from service.worker.admission import Admission
from service.worker.file_work import FileWork
from service.worker.loop import Arrival, Loop
from service.worker.loop_status import LoopStatus
from service.worker.pace import Pace
from service.worker.scheduler import PrefillLimits, Scheduler
from service.worker.training_desk import PreparedJob, TrainingDesk
from service.worker.training_plan import MAX_STEPS
from service.worker.training_share import TrainingShare
from service.worker.training_turns import TrainingTurns
from service.worker.work_done import WorkDone
from tests.fakes.arithmetic_engine import ArithmeticEngine
from tests.test_loop import Steps, generate


class AtOnce(Executor):
    """Does in `submit` what it is given."""

    def submit(self, task, /, *arguments, **named):
        done = Future()
        done.set_result(task(*arguments, **named))
        return done


class TrainingWorker:
    """Admission, loop and jobs of a worker process, without its threads."""

    def __init__(self, directory, share=0.4, num_steps=1):
        self.engine = ArithmeticEngine(EngineOptions("x", 4, 64, Path("/nowhere"), adapter_slots=2))
        self.directory = directory
        self.admission = Admission(
            self.engine.info, self.engine.codec, max_requests=100, max_tokens=10_000
        )
        self.arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self.events = []
        self.status = LoopStatus()
        store, work = AdapterStore(), WorkDone({})
        files = FileWork(self.arrivals.put, AtOnce())
        desk = TrainingDesk(self.engine.trainer, store, work, files, checkpoint_seconds=1000)
        self.loop = Loop(
            *(self.engine, self.admission, self.arrivals, self.events.extend, self.status),
            *(Steps(num_steps), AdapterDesk(self.engine, store)),
            TrainingTurns(desk, share),
            work,
        )
        # What the engine was asked for, in order.
        self.kinds = []
        for owner, name in ((self.engine, "decode"), (self.engine.trainer, "advance")):
            setattr(owner, name, self._noting(name, getattr(owner, name)))

    def _noting(self, name, own):
        def noted(*arguments):
            self.kinds.append(name)
            return own(*arguments)

        return noted

    def start(self, job, num_steps, publish_every=0):
        rows = tuple(TrainingRow((0, number), (False, True)) for number in range(1, 4))
        plan = TrainingPlan(
            job, rows, (), num_steps, "keras", 8, 8.0, ("query",), 1, 0.1, "constant", 0, 0.0,
            None, 0,
        )  # fmt: skip
        estimate = self.engine.trainer.estimate(plan)
        self.arrivals.put(PreparedJob(plan, estimate))
        self.arrivals.put(StartJob(job, str(self.directory / job), publish_every, MAX_STEPS))

    def generate(self, command):
        request, _ = self.admission.admit(command)
        self.arrivals.put(request)

    def run(self, num_turns):
        for _ in range(num_turns):
            self.loop.turn()

    def run_until(self, kind):
        for _ in range(5000):
            self.loop.turn()
            if any(isinstance(event, kind) for event in self.events):
                return
        raise AssertionError("the loop does not end")


def test_alone_every_turn_is_one_slice(tmp_path):
    worker = TrainingWorker(tmp_path)
    worker.start("a", 10)
    worker.run(3)
    before = len(worker.kinds)
    worker.run(5)
    assert worker.kinds[before:] == ["advance"] * 5
    worker.run_until(JobEnded)
    assert [event.step for event in worker.events if isinstance(event, JobStep)] == [*range(1, 11)]
    work = worker.status.work
    # Rows of two tokens in shapes of eight.
    assert (work.train, work.train_padding) == (20, 60)
    assert worker.engine.trainer.num_jobs == 0
    assert worker.status.training_seconds > 0


def test_a_stream_has_a_step_between_any_two_turns_of_training(tmp_path, monkeypatch):
    monkeypatch.setenv("ARITHMETIC_STEP_SECONDS", "0.010")
    monkeypatch.setenv("ARITHMETIC_SLICE_SECONDS", "0.003")
    worker = TrainingWorker(tmp_path)
    worker.start("a", 1000)
    worker.generate(generate("g", (1,), max_tokens=30))
    worker.run_until(Finished)
    between = "".join({"decode": "D", "advance": "t"}[kind] for kind in worker.kinds)
    between = between[between.index("D") :].split("D")[1:-1]
    # Six or seven milliseconds are earned by a step of ten, and nine is what a stream may wait.
    assert max(map(len, between)) <= 4
    assert 1.2 <= sum(map(len, between)) / len(between) <= 2.8


@pytest.mark.parametrize(("share", "is_some"), [(0.0, False), (0.8, True)])
def test_the_share_says_how_much_training_there_is_beside_others(
    tmp_path, monkeypatch, share, is_some
):
    monkeypatch.setenv("ARITHMETIC_STEP_SECONDS", "0.004")
    monkeypatch.setenv("ARITHMETIC_SLICE_SECONDS", "0.002")
    worker = TrainingWorker(tmp_path, share)
    worker.generate(generate("g", (1,), max_tokens=20))
    worker.run(2)
    worker.start("a", 1000)
    worker.run_until(Finished)
    num_slices, num_steps = worker.kinds.count("advance"), worker.kinds.count("decode")
    if is_some:
        # Four seconds a second of others: eight slices of two for a step of four.
        assert 4 <= num_slices / num_steps <= 9
    else:
        assert num_slices == 0
        worker.run(3)
        assert worker.kinds.count("advance") == 3, "nobody else is there now"


def test_a_request_has_the_same_tokens_beside_training(tmp_path):
    worker = TrainingWorker(tmp_path)
    worker.start("a", 50)
    worker.generate(generate("g", "1 2 3 4 5 6 7 8 9", max_tokens=4))
    worker.run_until(Finished)
    pieces = [event for event in worker.events if hasattr(event, "token_ids")]
    assert [id_ for piece in pieces for id_ in piece.token_ids] == [45, 90, 180, 360]


def test_a_job_that_ends_while_others_train_leaves_them(tmp_path):
    worker = TrainingWorker(tmp_path)
    worker.start("a", 3)
    worker.start("b", 30)
    worker.run_until(JobEnded)
    assert worker.engine.trainer.num_jobs == 1
    worker.arrivals.put(CancelJob("b"))
    worker.run(2)
    ends = [(event.job_id, event.end) for event in worker.events if isinstance(event, JobEnded)]
    assert ends == [("a", "succeeded"), ("b", "cancelled")]
    assert worker.engine.trainer.num_jobs == 0


# --- shares, worked out by hand ---------------------------------------------------------------


def test_a_share_is_earned_by_what_others_take_and_spent_by_training():
    share = TrainingShare(0.25)
    assert not share.is_due
    share.note_others(0.3)
    assert share.earned_seconds == pytest.approx(0.1)
    share.note_training(0.16)
    assert not share.is_due
    share.note_others(0.15)
    assert share.earned_seconds == 0
    share.note_others(0.06)
    assert share.earned_seconds == pytest.approx(0.01)


def test_no_more_than_a_moment_is_saved_up_or_owed():
    share = TrainingShare(0.5)
    share.note_others(1000)
    assert share.earned_seconds == 0.5
    share.note_training(1000)
    share.note_others(0.4)
    assert not share.is_due
    share.note_others(0.2)
    assert share.earned_seconds == pytest.approx(0.1)


def test_slices_take_as_long_as_streams_can_bear_or_as_they_have_earned():
    pace = Pace()
    assert pace.training_seconds(0.5, is_accompanied=True) == 0.1
    pace.note_steps(1, 0.02)
    assert pace.training_seconds(0.5, is_accompanied=True) == pytest.approx(0.018)
    assert pace.training_seconds(4.0, is_accompanied=True) == pytest.approx(0.08)
    assert pace.training_seconds(4.0, is_accompanied=False) == 0.1


# --- the scheduler ----------------------------------------------------------------------------


def test_prompts_scores_and_training_take_turns_with_a_step_between():
    scheduler = Scheduler(2, PrefillLimits(4))
    scheduler.submit([Row(RowKey("a", 0), 0), Row(RowKey("b", 0), 100)])
    scheduler.start_waiting()
    scheduler.has_scores = scheduler.has_training = scheduler.is_training_due = True
    kinds = []
    for _ in range(12):
        action = scheduler.next_action()
        kinds.append(type(action))
        if isinstance(action, Prefill):
            scheduler.record_prefill(action)
    assert kinds == [Prefill, Decode, ReadScores, Decode, Train, Decode] * 2


def test_training_that_is_not_due_has_what_nobody_else_wants():
    scheduler = Scheduler(2, PrefillLimits(4))
    assert isinstance(scheduler.next_action(), Idle)
    scheduler.has_training = True
    assert [type(scheduler.next_action()) for _ in range(3)] == [Train] * 3
    row = Row(RowKey("a", 0), 0)
    scheduler.submit([row])
    scheduler.start_waiting()
    assert [type(scheduler.next_action()) for _ in range(3)] == [Decode] * 3
    scheduler.remove(row)
    assert isinstance(scheduler.next_action(), Train)
