"""Starts the worker process, watches it, and starts it again when it dies or hangs.

The worker is a program of its own (``python -m service.worker``) that inherits one end of a
socketpair; there is no other socket. Its life as seen from here::

    STARTING --Ready--> READY --death or hang--> RESTARTING --Ready--> READY
        |                                            |
        +--LoadFailed, permanent--> FAILED <---------+
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from enum import StrEnum
from typing import Protocol, assert_never

from service.errors import Loading, WorkerRestarting
from service.own_modules import own_modules
from service.protocol import framing
from service.protocol.framing import AnyCommand, AnyEvent
from service.protocol.messages import (
    Accepted,
    Failed,
    Finished,
    Heartbeat,
    Load,
    LoadFailed,
    Piece,
    Progress,
    Ready,
    RequestEvent,
    Scored,
    ServerInfo,
)
from service.protocol.training import (
    AdapterExported,
    AdapterFailed,
    AdapterImported,
    AdapterSaved,
    JobEnded,
    JobEval,
    JobPaused,
    JobPrepared,
    JobRefused,
    JobsHalted,
    JobStep,
    JobVersion,
    TrainingEvent,
)

log = logging.getLogger(__name__)

_WATCH_SECONDS = 0.1
# Four lost heartbeats in a row are a coincidence; forty are not.
_HEARTBEAT_LIMIT_SECONDS = 10.0
_FIRST_BACK_OFF_SECONDS = 0.5
_LONGEST_BACK_OFF_SECONDS = 30.0
# A worker that lived this long makes the next death a first one.
_STABLE_SECONDS = 60.0
_DUMP_SECONDS = 0.3


class WorkerState(StrEnum):
    """See the drawing above."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"


class WorkerListener(Protocol):
    """Told what happens to the worker, on the event loop's thread."""

    def on_progress(self, progress: Progress) -> None: ...

    def on_ready(self, info: ServerInfo, num_compilations: int) -> None: ...

    def on_heartbeat(self, heartbeat: Heartbeat) -> None: ...

    def on_request_event(self, event: RequestEvent) -> None: ...

    def on_training_event(self, event: TrainingEvent) -> None: ...

    def on_lost(self, reason: str) -> None: ...


class LoadRefused(Exception):
    """The worker says that no restart will help; the message is one line for the operator."""


class Supervisor:
    """Owns the worker process.

    Args:
        load: The first command of every worker.
        listener: Told what happens.
        step_timeout_seconds: A step that takes longer counts as hung.
        load_timeout_seconds: Loading without progress for longer counts as hung.
        log_level: Of the worker.
    """

    def __init__(
        self,
        load: Load,
        listener: WorkerListener,
        *,
        step_timeout_seconds: float,
        load_timeout_seconds: float,
        log_level: str = "INFO",
    ) -> None:
        self._load = load
        self._listener = listener
        self._step_timeout_seconds = step_timeout_seconds
        self._load_timeout_seconds = load_timeout_seconds
        self._log_level = log_level
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._heartbeat: tuple[Heartbeat | None, float] = (None, 0.0)
        self._refusal: str | None = None
        self._was_ready = False
        self.state = WorkerState.STARTING
        self.info: ServerInfo | None = None
        self.progress: Progress | None = None
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        """Of the worker, while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def heartbeat_age_seconds(self) -> float:
        """Since the last sign of life."""
        return time.monotonic() - self._heartbeat[1]

    @property
    def is_hung(self) -> bool:
        """Whether the worker gave no sign of life, or its loop no progress, for too long."""
        heartbeat, received_at = self._heartbeat
        age = time.monotonic() - received_at
        if age > _HEARTBEAT_LIMIT_SECONDS:
            return True
        if heartbeat is None or heartbeat.phase == "idle":
            return False
        is_step = heartbeat.phase == "step"
        limit = self._step_timeout_seconds if is_step else self._load_timeout_seconds
        return heartbeat.phase_seconds + age > limit

    def send(self, command: AnyCommand) -> None:
        """Sends one command to a worker that is ready.

        Raises:
            Loading: The first worker is not ready yet.
            WorkerRestarting: The next one is not.
        """
        if self.state is WorkerState.STARTING:
            raise Loading("The model is still loading; /ready shows how far it is.")
        if self.state is not WorkerState.READY or self._writer is None:
            raise WorkerRestarting("The worker is being restarted.")
        self._writer.write(framing.encode([command]))

    async def run(self) -> None:
        """Keeps a worker running until cancelled.

        Raises:
            LoadRefused: The engine cannot be loaded, now or ever.
        """
        back_off_seconds = _FIRST_BACK_OFF_SECONDS
        while True:
            started_at = time.monotonic()
            reason = await self._run_one()
            if self._refusal is not None:
                self.state = WorkerState.FAILED
                raise LoadRefused(self._refusal)
            self.num_restarts += 1
            if time.monotonic() - started_at > _STABLE_SECONDS:
                back_off_seconds = _FIRST_BACK_OFF_SECONDS
            log.error("%s; starting it again in %.1f s", reason, back_off_seconds)
            await asyncio.sleep(back_off_seconds)
            back_off_seconds = min(2 * back_off_seconds, _LONGEST_BACK_OFF_SECONDS)

    async def _run_one(self) -> str:
        """One worker from start to end; returns why it ended."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = self._spawn(theirs.fileno())
        self._process = process
        self._heartbeat = (None, time.monotonic())
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        self._writer = writer
        writer.write(framing.encode([self._load]))
        watching = asyncio.create_task(self._watch(process))
        try:
            await self._read(reader)
        finally:
            watching.cancel()
            self._writer = None
            self.state = WorkerState.RESTARTING if self._was_ready else WorkerState.STARTING
            writer.close()
            # The read ended, so the worker is dead, dying, or talks nonsense: make it sure.
            process.kill()
            status = process.wait()
            self._process = None
        reason = f"The worker ended with {_describe(status)}"
        self._listener.on_lost(reason)
        return reason

    def _spawn(self, descriptor: int) -> subprocess.Popen[bytes]:
        arguments = ["--fd", str(descriptor), "--parent", str(os.getpid())]
        arguments += ["--log-level", self._log_level]
        # From the main thread: the kernel ties the worker's life to the thread that started it.
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "service.worker", *arguments],
            env={**os.environ, "PYTHONPATH": own_modules()},
            pass_fds=(descriptor,),
            stdin=subprocess.DEVNULL,
            # Ctrl-C in a terminal reaches the whole group; only we decide when the worker stops.
            start_new_session=True,
        )

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Events until the connection ends or the worker talks nonsense."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                prefix = await reader.readexactly(framing.LENGTH_BYTES)
                try:
                    body = await reader.readexactly(framing.body_length(prefix))
                    events = framing.decode_events(body)
                except framing.ProtocolError:
                    log.exception("the worker sent a malformed frame")
                    return
                for event in events:
                    self._handle(event)

    def _handle(self, event: AnyEvent) -> None:
        match event:
            case Heartbeat():
                self._heartbeat = (event, time.monotonic())
                self._listener.on_heartbeat(event)
            case Progress():
                self.progress = event
                self._listener.on_progress(event)
            case Ready():
                self.info, self.state, self._was_ready = event.info, WorkerState.READY, True
                self._listener.on_ready(event.info, event.num_compilations)
            case LoadFailed():
                log.error("%s", event.detail)
                if event.is_permanent:
                    self._refusal = event.detail
            case Accepted() | Piece() | Finished() | Scored() | Failed():
                self._listener.on_request_event(event)
            case JobPrepared() | JobRefused() | JobStep() | JobEval() | JobVersion():
                self._listener.on_training_event(event)
            case JobPaused() | JobEnded() | JobsHalted():
                self._listener.on_training_event(event)
            case AdapterSaved() | AdapterImported() | AdapterExported() | AdapterFailed():
                self._listener.on_training_event(event)
            case _ as unreachable:
                assert_never(unreachable)

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kills a worker that hangs; the end of its socket then tells `_read`."""
        while not self.is_hung:  # noqa: ASYNC110 (a hang is that nothing happens)
            await asyncio.sleep(_WATCH_SECONDS)
        log.error("the worker hangs; its stacks follow")
        process.send_signal(signal.SIGUSR1)
        await asyncio.sleep(_DUMP_SECONDS)
        process.kill()


def _describe(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name
    return f"{name} (out of memory?)" if name == "SIGKILL" else name
