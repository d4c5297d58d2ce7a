"""A worker process on the arithmetic engine, spoken to over its socket as the API process does."""

import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from service.protocol import framing
from service.protocol.framing import AnyCommand, AnyEvent
from service.protocol.messages import Heartbeat, Load, Ready
from service.protocol.training import Form, Hyperparameters, JobEnded, PrepareJob, Row
from service.worker.channel import ConnectionClosed

ENGINE = "tests.fakes.arithmetic_engine:load"
REPOSITORY = Path(__file__).parents[1]
FORM = Form("keras", 8, 8.0, ("query", "value"))

_Event = TypeVar("_Event", bound=AnyEvent)


def hyperparameters(**changed: Any) -> Hyperparameters:
    """Of a small job."""
    usual: dict[str, Any] = {
        "form": FORM,
        "epochs": 1,
        "steps": None,
        "batch_size": 2,
        "learning_rate": 0.01,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "grad_clip": None,
        "max_length": 32,
        "seed": 0,
    }
    if "steps" in changed:
        usual["epochs"] = None
    return Hyperparameters(**{**usual, **changed})


def prepare(job_id: str, *rows: Row, validation: Any = (), init: Any = None, **changed: Any):
    """A job of these rows."""
    return PrepareJob(job_id, "default", hyperparameters(**changed), rows, validation, init)


class WorkerProcess:
    """See the module."""

    def __init__(self, load: Load, environment: dict[str, str], prefix: list[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            words = [*prefix, sys.executable, "-m", "service.worker"]
            self.process = subprocess.Popen(
                [*words, "--fd", str(theirs.fileno()), "--parent", str(os.getpid())],
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        self._socket = ours
        self._arrived: queue.Queue[AnyEvent | None] = queue.Queue()
        self.heartbeat: Heartbeat | None = None
        # Everything but signs of life, in order.
        self.events: list[AnyEvent] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.send(load)
        self.wait(Ready)

    def send(self, *commands: AnyCommand) -> None:
        self._socket.sendall(framing.encode(commands))

    def wait(
        self, kind: type[_Event], condition: Callable[[_Event], bool] = lambda _: True
    ) -> _Event:
        """The next event of this kind, of which ``condition`` is true."""
        deadline = time.monotonic() + 20
        while True:
            event = self._arrived.get(timeout=max(deadline - time.monotonic(), 0.01))
            assert event is not None, self.stderr()
            self.events.append(event)
            if isinstance(event, kind) and condition(event):
                return event

    def events_of(self, kind: type[_Event]) -> list[_Event]:
        """So far."""
        return [event for event in self.events if isinstance(event, kind)]

    def had(self, kind: type[_Event], condition: Callable[[_Event], bool]) -> _Event:
        """The same, but it may have come before."""
        for event in self.events_of(kind):
            if condition(event):
                return event
        return self.wait(kind, condition)

    def ended(self, job_id: str) -> JobEnded:
        """How a job ends, or has ended."""
        return self.had(JobEnded, lambda event: event.job_id == job_id)

    def kill(self) -> None:
        """As the kernel does when memory is short."""
        self.process.kill()
        self.process.wait()

    def stderr(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def close(self) -> None:
        self._socket.close()
        self.process.kill()
        self.process.communicate()

    def _read(self) -> None:
        while True:
            try:
                length = framing.body_length(self._exactly(framing.LENGTH_BYTES))
                events = framing.decode_events(self._exactly(length))
            except (ConnectionClosed, OSError):
                self._arrived.put(None)
                return
            for event in events:
                if isinstance(event, Heartbeat):
                    self.heartbeat = event
                else:
                    self._arrived.put(event)

    def _exactly(self, num_bytes: int) -> bytes:
        buffer = bytearray()
        while len(buffer) < num_bytes:
            received = self._socket.recv(num_bytes - len(buffer))
            if not received:
                raise ConnectionClosed
            buffer += received
        return bytes(buffer)


@contextlib.contextmanager
def running_worker(
    *, prefix: tuple[str, ...] = (), load: dict[str, Any] | None = None, **environment: str
) -> Iterator[WorkerProcess]:
    """A worker that is ready; ``prefix`` are words in front of its command line."""
    fields: dict[str, Any] = {
        "engine": ENGINE,
        "preset": "x",
        "cache_dir": "/nowhere",
        "num_slots": 4,
        "context_tokens": 64,
        "max_queued_requests": 100,
        "max_queued_tokens": 100_000,
        "adapter_slots": 2,
        "checkpoint_seconds": 0.0,
    }
    worker = WorkerProcess(Load(**{**fields, **(load or {})}), environment, list(prefix))
    try:
        yield worker
    finally:
        worker.close()
