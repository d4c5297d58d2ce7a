"""Everything of a worker that is about jobs and versions, and what is done with each command.

Three threads beside the loop work here, and none of them calls the model: one makes jobs ready, one
writes and reads checkpoints, and two save and convert versions (`service.worker.adapter_files`).
What the loop must know arrives there as requests do.
"""

from collections.abc import Callable
from typing import assert_never

from model.slots import Engine
from service.protocol.training import (
    AddAdapter,
    CancelJob,
    ExportAdapter,
    ForgetAdapter,
    HaltJobs,
    ImportAdapter,
    PrepareJob,
    SaveAdapter,
    StartJob,
    TrainingCommand,
    TrainingEvent,
)
from service.worker.adapter_files import AdapterFiles
from service.worker.adapter_store import AdapterStore
from service.worker.file_work import FileWork
from service.worker.training_desk import TrainingDesk
from service.worker.training_preparation import Preparation
from service.worker.training_turns import TrainingArrival, TrainingTurns
from service.worker.work_done import WorkDone


class TrainingRoom:
    """The reader hands it commands.

    Args:
        engine: Of the worker.
        store: Its versions.
        arrive: Takes what the loop must know, on any thread.
        send: Takes events, on any thread.
        work: Counts tokens.
        train_share: Of the time, while others are served.
        checkpoint_seconds: Of training that may be lost.
    """

    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        arrive: Callable[[ForgetAdapter | TrainingArrival], None],
        send: Callable[[list[TrainingEvent]], None],
        work: WorkDone,
        *,
        train_share: float,
        checkpoint_seconds: float,
    ) -> None:
        self._store = store
        self._arrive = arrive
        self._files = AdapterFiles(engine, store, send)
        self._preparation = Preparation(engine, store, arrive, send)
        files = FileWork(arrive)
        desk = TrainingDesk(
            engine.trainer, store, work, files, checkpoint_seconds=checkpoint_seconds
        )
        self.turns = TrainingTurns(desk, train_share)

    def take(self, command: TrainingCommand) -> None:
        """Begins what was asked; never waits."""
        match command:
            case PrepareJob():
                self._preparation.submit(command)
            case StartJob() | HaltJobs():
                self._arrive(command)
            case CancelJob():
                self._preparation.cancel(command.job_id)
                self._arrive(command)
            case SaveAdapter() | ImportAdapter() | ExportAdapter():
                self._files.do(command)
            case AddAdapter():
                self._store.add_source(command.source)
            case ForgetAdapter():
                # Nobody is admitted for it from now on; the loop knows who was before.
                self._store.forget(command.digest)
                self._arrive(command)
            case _ as unreachable:
                assert_never(unreachable)
