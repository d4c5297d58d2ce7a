"""Jobs made ready to start, by a thread of its own that calls no model.

Not by the reader's: a large job takes seconds, and a request that comes meanwhile is to be admitted
in less than ten milliseconds. Not by the loop's: that has steps to do. The thread pauses after each
piece of some milliseconds, so that whoever else wants the interpreter has it.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable

from model.errors import ModelError
from model.slots import Engine
from model.training import TrainingPlan
from service.protocol.training import (
    FieldError,
    JobPrepared,
    JobRefused,
    PrepareJob,
    TrainingEvent,
)
from service.worker.adapter_files import content_of
from service.worker.adapter_store import AdapterStore
from service.worker.training_desk import PreparedJob
from service.worker.training_plan import InitialAdapter, JobInvalid, PlanMaker

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.001


class Preparation:
    """Answers each `PrepareJob` with one event, in order.

    Args:
        engine: Has the vocabulary and the trainer.
        store: Has the versions to go on from.
        deliver: Takes a job that may be started, before anybody is told.
        send: Takes events, on any thread.
    """

    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        deliver: Callable[[PreparedJob], None],
        send: Callable[[list[TrainingEvent]], None],
    ) -> None:
        self._engine = engine
        self._store = store
        self._deliver = deliver
        self._send = send
        self._plans = PlanMaker(engine.info, engine.codec)
        self._commands: queue.SimpleQueue[PrepareJob] = queue.SimpleQueue()
        # Jobs that were asked for and not cancelled since.
        self._wanted: set[str] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="preparation", daemon=True).start()

    def submit(self, command: PrepareJob) -> None:
        """Lets a job wait for its turn."""
        with self._lock:
            self._wanted.add(command.job_id)
        self._commands.put(command)

    def cancel(self, job_id: str) -> None:
        """A job that is not ready yet is not kept when it is."""
        with self._lock:
            self._wanted.discard(job_id)

    def _run(self) -> None:
        while True:
            command = self._commands.get()
            try:
                event = self._prepare(command)
            except JobInvalid as error:
                event = error.refused
            except Exception:
                log.exception("preparing job %s failed", command.job_id)
                event = JobRefused(command.job_id, "internal", "Preparing the job failed.")
            self._send([event])

    def _prepare(self, command: PrepareJob) -> TrainingEvent:
        trainer = self._engine.trainer
        if trainer is None:
            detail = "This service trains nothing; start it with --adapter-slots of at least 1."
            return JobRefused(command.job_id, "invalid_field", detail)
        plan = self._planned(command)
        estimate = trainer.estimate(plan)
        event = JobPrepared(
            job_id=command.job_id,
            num_steps=plan.num_steps,
            num_tokens=estimate.num_tokens,
            num_padded_tokens=estimate.num_padded_tokens,
            seconds=estimate.seconds,
            first_rows=self._plans.shown(plan),
        )
        with self._lock:
            if command.job_id in self._wanted:
                self._wanted.remove(command.job_id)
                self._deliver(PreparedJob(plan, estimate))
        return event

    def _planned(self, command: PrepareJob) -> TrainingPlan:
        making = self._plans.make(command, self._initial(command))
        while True:
            try:
                next(making)
            except StopIteration as done:
                plan: TrainingPlan = done.value
                return plan
            time.sleep(_PAUSE_SECONDS)

    def _initial(self, command: PrepareJob) -> InitialAdapter | None:
        """The version to go on from, as a trainer takes it."""
        if command.init is None:
            return None
        if command.init not in self._store:
            raise _init_refused(command, "adapter_not_found", "This version is not here.")
        try:
            content = content_of(self._engine, self._store, command.init)
            return InitialAdapter(content, self._engine.adapter_form(content))
        except ModelError as error:
            log.error("%s", error)
            detail = "The version to go on from cannot be read, or is of another model."
            raise _init_refused(command, "adapter_mismatch", detail) from error


def _init_refused(command: PrepareJob, code: str, detail: str) -> JobInvalid:
    return JobInvalid(JobRefused(command.job_id, code, detail, (FieldError("/init", detail),)))
