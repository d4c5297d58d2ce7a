"""The worker process: ``python -m service.worker --fd N --parent PID``.

Started by the supervisor, which passes one end of a socketpair as file descriptor N. The first
command is `Load`; everything else is in `service.worker.loop`.

``python -m service.worker presets|fetch|export ...`` serves nobody: it does one thing and ends; see
`service.worker.commands`.
"""

import argparse
import faulthandler
import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time

from model.attribution_questions import AttributionEngine, AttributionEngineLoader
from model.errors import KernelsUnavailable, ModelError, PresetError, SelfTestFailed
from service.logs import log_to_stderr
from service.protocol.framing import AnyCommand, ProtocolError
from service.protocol.messages import (
    Cancel,
    Failed,
    Generate,
    Heartbeat,
    Load,
    LoadFailed,
    Progress,
    Ready,
    Score,
)
from service.worker import translate
from service.worker.adapter_desk import AdapterDesk
from service.worker.adapter_store import AdapterStore
from service.worker.admission import Admission, AdmittedRequest, Refusal
from service.worker.channel import ConnectionClosed, Writer, read_frame
from service.worker.loop import Arrival, Loop
from service.worker.loop_status import LoopStatus
from service.worker.parent import die_with_parent
from service.worker.score_request import ScoreRequest
from service.worker.training_room import TrainingRoom
from service.worker.work_done import WorkDone

_HEARTBEAT_SECONDS = 0.25
_PROGRESS_SECONDS = 0.1
_EXIT_BAD_PRESET = 65  # EX_DATAERR
_EXIT_BUG = 70  # EX_SOFTWARE

log = logging.getLogger("service.worker")


class Worker:
    """Everything of the process but its arguments."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._writer = Writer(connection)
        self._status = LoopStatus()
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._admission: Admission | None = None
        self._engine: AttributionEngine | None = None
        self._training: TrainingRoom | None = None
        self._last_progress: tuple[str, float] = ("", 0.0)

    def run(self) -> int:
        """Loads, then serves until the API process goes; returns the exit status."""
        load = self._first_command()
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        try:
            engine = self._load(load)
            adapters = AdapterDesk(engine, AdapterStore(load.adapters))
            adapters.open_all()
        except (PresetError, SelfTestFailed, KernelsUnavailable) as error:
            return self._refuse_to_load(str(error), is_permanent=True)
        except Exception as error:
            log.exception("loading failed")
            detail = f"Loading failed: {type(error).__name__}. The log has the details."
            return self._refuse_to_load(detail, is_permanent=False)
        self._engine = engine
        self._admission = Admission(
            engine.info,
            engine.codec,
            max_requests=load.max_queued_requests,
            max_tokens=load.max_queued_tokens,
            adapters=adapters.store,
        )
        work = WorkDone(engine.info.buckets)
        self._training = TrainingRoom(
            engine,
            adapters.store,
            self._arrivals.put,
            self._writer.send,
            work,
            train_share=load.train_share,
            checkpoint_seconds=load.checkpoint_seconds,
        )
        self._writer.send([Ready(translate.server_info(engine.info), engine.num_compilations)])
        arguments = (engine, self._admission, self._arrivals, self._writer.send, self._status)
        try:
            turns = self._training.turns
            Loop(*arguments, adapters=adapters, training=turns, work=work).run()
        except Exception:
            # The caches may be gone with the failed step, so a fresh process is the way back.
            log.exception("the loop failed")
        return _EXIT_BUG

    def _first_command(self) -> Load:
        commands = read_frame(self._connection)
        if len(commands) != 1 or not isinstance(commands[0], Load):
            raise ProtocolError("The first command must be Load.")
        return commands[0]

    def _load(self, load: Load) -> AttributionEngine:
        module, _, function = load.engine.partition(":")
        loader: AttributionEngineLoader = getattr(importlib.import_module(module), function)
        return loader(translate.engine_options(load), self._progress)

    def _progress(self, phase: str, done: float, total: float) -> None:
        self._status.enter(phase)  # type: ignore[arg-type]
        last_phase, last_time = self._last_progress
        now = time.monotonic()
        if phase == last_phase and done < total and now - last_time < _PROGRESS_SECONDS:
            return
        self._last_progress = (phase, now)
        self._writer.send_if_room([Progress(phase, done, total)])  # type: ignore[arg-type]

    def _refuse_to_load(self, detail: str, *, is_permanent: bool) -> int:
        self._writer.send([LoadFailed(detail, is_permanent)])
        self._writer.flush()
        return _EXIT_BAD_PRESET if is_permanent else _EXIT_BUG

    def _read(self) -> None:
        """The reader's thread. When the API process goes, or talks nonsense, so do we."""
        try:
            while True:
                for command in read_frame(self._connection):
                    self._handle(command)
        except ConnectionClosed:
            os._exit(0)
        except Exception:
            log.exception("the reader failed")
            os._exit(_EXIT_BUG)

    def _handle(self, command: AnyCommand) -> None:
        match command:
            case Generate() | Score():
                self._admit(command)
            case Cancel():
                self._arrivals.put(command)
            case Load():
                raise ProtocolError("A worker loads once.")
            case _:
                if self._training is None:
                    raise ProtocolError("Jobs and versions come when the worker is ready.")
                self._training.take(command)

    def _admit(self, command: Generate | Score) -> None:
        """Answers with Accepted or Failed at once, however long the loop's step is."""
        try:
            if self._admission is None:
                raise Refusal(_loading(command))
            request: AdmittedRequest | ScoreRequest
            if isinstance(command, Score):
                request, accepted = self._admission.admit_score(command)
            else:
                request, accepted = self._admission.admit(command)
        except Refusal as refusal:
            self._writer.send([refusal.failed])
        except ModelError as error:
            code = translate.error_code(error)
            self._writer.send([Failed(command.request_id, code, str(error))])
        except Exception:
            # One text that the tokenizer cannot take must not take the worker with it.
            log.exception("admitting %s failed", command.request_id)
            self._writer.send([Failed(command.request_id, "internal", "Admission failed.")])
        else:
            # Accepted goes out before the loop can know of the request and send its first piece.
            self._writer.send([accepted])
            self._arrivals.put(request)

    def _beat(self) -> None:
        """The heartbeat's thread: a loop that hangs cannot hide behind it."""
        while True:
            phase, since = self._status.phase
            admission, engine = self._admission, self._engine
            beat = Heartbeat(
                turn=self._status.turn,
                phase=phase,
                phase_seconds=time.monotonic() - since,
                num_running=self._status.num_running,
                num_waiting=0 if admission is None else admission.num_waiting,
                num_waiting_tokens=0 if admission is None else admission.num_waiting_tokens,
                num_compilations=0 if engine is None else engine.num_compilations,
                work=self._status.work,
                num_scoring=self._status.num_scoring,
                num_scores_waiting=0 if admission is None else admission.num_scores_waiting,
                adapters=self._status.adapters,
                training_seconds=self._status.training_seconds,
            )
            self._writer.send_if_room([beat])
            time.sleep(_HEARTBEAT_SECONDS)


def _loading(command: Generate | Score) -> Failed:
    detail = "The model is still loading."
    return Failed(command.request_id, "loading", detail, retry_after_seconds=5)


def main() -> int:
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        # Imported late: a worker that serves loads what it needs with its engine.
        from service.worker import commands

        return commands.main(sys.argv[1:])
    parser = argparse.ArgumentParser(prog="python -m service.worker")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket")
    parser.add_argument("--parent", type=int, required=True, help="process id of the API process")
    parser.add_argument("--log-level", default="INFO")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    log_to_stderr(arguments.log_level)
    connection = socket.socket(fileno=arguments.fd)
    return Worker(connection).run()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # Threads that wait in the kernel must not keep a finished worker alive.
    os._exit(status)
