"""One running service: the worker under its supervisor, and the HTTP server in front of it.

The port is bound before anything is loaded, so that a port in use is known at once and `/ready` can
tell how far the start is.

On SIGTERM or SIGINT the service drains: it is not ready at once and refuses new work, but answers;
what runs may end within the drain time, and what does not is ended with a proper error. Then it
leaves with status 0. Jobs stop at once and are saved. A second signal skips the wait.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from service.adapters import AdapterNames
from service.api.state import Readiness, ServiceState
from service.app import create_app
from service.connection import connection_class
from service.jobs.training import DataFiles, open_training
from service.observability import Metrics
from service.protocol.messages import (
    AdapterSource,
    Heartbeat,
    Load,
    Progress,
    RequestEvent,
    ServerInfo,
)
from service.protocol.training import TrainingEvent
from service.protocol.worker_counts import AdapterCounts, WorkCounts
from service.settings import Settings
from service.startup_display import StartupDisplay
from service.supervisor import Supervisor, WorkerState
from service.version import VERSION
from service.worker_client import WorkerClient

log = logging.getLogger(__name__)

# One request line and its headers; h11 closes the connection beyond it.
_MAX_HEADER_BYTES = 16 * 1024
_KEEP_ALIVE_SECONDS = 5
_BACKLOG = 2048
_DRAIN_POLL_SECONDS = 0.05
_SHARE_SECONDS = 1.0
# After draining, for handlers to write the last bytes of what was ended.
_LAST_WORDS_SECONDS = 2
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Service:
    """Everything that runs in the API process; a `WorkerListener` and a `WorkerView`.

    Args:
        settings: Of the service.
        url: Under which it is reached.
        display: Shows the start.
        adapters: That requests may name.
        files: Of the data folder.
    """

    def __init__(
        self,
        settings: Settings,
        url: str,
        display: StartupDisplay,
        adapters: AdapterNames,
        files: DataFiles,
    ) -> None:
        self._settings = settings
        self._url = url
        self._display = display
        self._metrics = Metrics()
        self._compilations_seen = 0
        self._work_seen = WorkCounts()
        self._adapters_seen = AdapterCounts()
        # Seconds of training, and when that was noted.
        self._trained = (0.0, time.monotonic())
        self._heartbeat: Heartbeat | None = None
        self._is_draining = False
        self.supervisor = Supervisor(
            _load_command(settings, adapters),
            self,
            step_timeout_seconds=settings.step_timeout_seconds,
            load_timeout_seconds=settings.load_timeout_seconds,
            log_level=settings.log_level,
        )
        self._client = WorkerClient(self.supervisor.send)
        send, uses = self.supervisor.send, self._client.uses
        training = open_training(files, settings, adapters, self._metrics, send, uses)
        self.training = training
        self._adapters = adapters
        state = ServiceState(settings, self._client, self, self._metrics, adapters, training)
        self.app = create_app(state)

    @property
    def info(self) -> ServerInfo | None:
        return self.supervisor.info

    def readiness(self) -> Readiness:
        """From what is known here; nobody is asked."""
        if self._is_draining:
            return Readiness("draining")
        match self.supervisor.state:
            case WorkerState.READY:
                return Readiness("worker_hung") if self.supervisor.is_hung else Readiness()
            case WorkerState.RESTARTING | WorkerState.FAILED:
                return Readiness("worker_restarting")
            case WorkerState.STARTING:
                progress = self.supervisor.progress
                if progress is None:
                    return Readiness("loading", 0.0)
                share = min(progress.done / progress.total, 1.0) if progress.total else 0.0
                is_compiling = progress.phase == "compile"
                return Readiness("compiling" if is_compiling else "loading", share)

    def refresh_gauges(self, metrics: Metrics) -> None:
        """Sets what is only known when asked for."""
        metrics.ready.set(self.readiness().reason is None)
        metrics.heartbeat_age.set(self.supervisor.heartbeat_age_seconds)
        metrics.resident_bytes.labels("api").set(_resident_bytes(os.getpid()))
        worker = self.supervisor.pid
        metrics.resident_bytes.labels("worker").set(_resident_bytes(worker) if worker else 0)
        heartbeat = self._heartbeat
        metrics.requests_running.labels("generate").set(heartbeat.num_running if heartbeat else 0)
        metrics.requests_waiting.labels("generate").set(heartbeat.num_waiting if heartbeat else 0)
        metrics.requests_running.labels("score").set(heartbeat.num_scoring if heartbeat else 0)
        waiting = heartbeat.num_scores_waiting if heartbeat else 0
        metrics.requests_waiting.labels("score").set(waiting)
        resident = heartbeat.adapters.num_resident if heartbeat else 0
        metrics.adapters.labels("resident").set(resident)
        places = ["host" if each.path is None else "disk" for each in self._adapters.versions]
        for place in ("host", "disk"):
            metrics.adapters.labels(place).set(places.count(place))
        metrics.queue_tokens.set(heartbeat.num_waiting_tokens if heartbeat else 0)

    async def drain(self, timeout_seconds: float) -> None:
        """Takes no new work; returns when nothing runs any more or the time is over.

        Jobs stop at once, so that streams have the worker to themselves. They go on at the next
        start.
        """
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self.training.jobs.halt()
                while self._client.num_in_flight:  # noqa: ASYNC110 (clients decide when)
                    await asyncio.sleep(_DRAIN_POLL_SECONDS)

    def end_running(self) -> None:
        """Ends what still runs with a proper error."""
        self._client.fail_all("draining", "The service stopped before this request had ended.")

    def on_progress(self, progress: Progress) -> None:
        self._display.progress(progress.phase, progress.done, progress.total)

    def on_ready(self, info: ServerInfo, num_compilations: int) -> None:
        self._count_compilations(num_compilations, "warmup")
        self.training.jobs.worker_ready(info.preset_digest)
        self._metrics.build_info.labels(
            VERSION, info.preset, info.dtype, info.backend, info.kernels, "none"
        ).set(1)
        facts = {"preset": info.preset, "url": self._url, "device": info.device}
        self._display.ready({**facts, "kernels": _kernels(info)})

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        is_serving = self.supervisor.state is WorkerState.READY
        self._count_compilations(heartbeat.num_compilations, "serving" if is_serving else "warmup")
        self._count_work(heartbeat.work)
        self._count_adapters(heartbeat.adapters)
        self._note_training(heartbeat.training_seconds)

    def on_request_event(self, event: RequestEvent) -> None:
        self._client.deliver(event)

    def on_training_event(self, event: TrainingEvent) -> None:
        self.training.jobs.deliver(event)

    def on_lost(self, reason: str) -> None:
        self._compilations_seen = 0
        self._work_seen = WorkCounts()
        self._adapters_seen = AdapterCounts()
        self._trained = (0.0, time.monotonic())
        self._heartbeat = None
        self._metrics.worker_restarts.inc()
        self._client.fail_all("worker_restarting", "The worker ended while it held this request.")
        self.training.jobs.worker_lost()
        self._display.close()

    def _count_work(self, work: WorkCounts) -> None:
        """What is new since the last heartbeat."""
        before, self._work_seen = self._work_seen, work
        for kind in ("prefill", "decode", "score", "train"):
            for use, suffix in (("request", ""), ("padding", "_padding")):
                name = kind + suffix
                new = getattr(work, name) - getattr(before, name)
                self._metrics.computed_tokens.labels(kind, use).inc(new)

    def _count_adapters(self, counts: AdapterCounts) -> None:
        """What is new since the last heartbeat."""
        before, self._adapters_seen = self._adapters_seen, counts
        self._metrics.adapter_loads.inc(counts.num_loads - before.num_loads)
        self._metrics.adapter_evictions.inc(counts.num_evictions - before.num_evictions)

    def _note_training(self, seconds: float) -> None:
        """The share of the worker's time that went to training, once a second."""
        (before, noted_at), now = self._trained, time.monotonic()
        if now - noted_at >= _SHARE_SECONDS:
            self._metrics.train_share.set((seconds - before) / (now - noted_at))
            self._trained = (seconds, now)

    def _count_compilations(self, total: int, phase: str) -> None:
        self._metrics.compilations.labels(phase).inc(max(total - self._compilations_seen, 0))
        self._compilations_seen = max(total, self._compilations_seen)


class Server(uvicorn.Server):
    """uvicorn that leaves the signals to us: it would raise them again and end with status −15."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    settings: Settings,
    listener: socket.socket,
    display: StartupDisplay,
    adapters: AdapterNames,
    files: DataFiles,
) -> None:
    """Runs until a signal.

    Raises:
        LoadRefused: The preset cannot be served; the message is one line for the operator.
    """
    service = Service(settings, _url(listener), display, adapters, files)
    config = uvicorn.Config(
        service.app,
        http=connection_class(settings.stream_stall_seconds),
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
    )
    server = Server(config)
    stopping = asyncio.create_task(_stop_on_signal(service, server, settings.drain_seconds))
    supervising = asyncio.create_task(service.supervisor.run())
    training = asyncio.create_task(service.training.jobs.run())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.wait((supervising, serving), return_when=asyncio.FIRST_COMPLETED)
        if supervising.done():
            server.should_exit = True
    finally:
        await serving
        stopping.cancel()
        supervising.cancel()
        display.close()
        training.cancel()
        await asyncio.gather(training, service.training.versions.close(), return_exceptions=True)
        with contextlib.suppress(asyncio.CancelledError):
            await supervising


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises OSError if the address is taken."""
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = infos[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _stop_on_signal(service: Service, server: Server, drain_seconds: float) -> None:
    """Drains after the first signal; the second one cuts that short."""
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    await signals.get()
    draining = asyncio.create_task(service.drain(drain_seconds))
    hurrying = asyncio.create_task(signals.get())
    await asyncio.wait((draining, hurrying), return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    hurrying.cancel()
    service.end_running()
    server.should_exit = True


def _load_command(settings: Settings, adapters: AdapterNames) -> Load:
    return Load(
        engine=settings.engine,
        preset=settings.preset,
        cache_dir=str(settings.cache_dir),
        num_slots=settings.slots,
        context_tokens=settings.context_tokens,
        max_queued_requests=settings.queue_requests,
        max_queued_tokens=settings.queue_tokens,
        prefix_cache_bytes=settings.prefix_cache_bytes,
        kernels=settings.kernels,
        adapter_slots=settings.adapter_slots,
        adapter_max_rank=settings.adapter_max_rank,
        train_share=settings.train_share,
        checkpoint_seconds=settings.checkpoint_seconds,
        adapters=tuple(
            AdapterSource(version.digest, str(version.path)) for version in adapters.versions
        ),
    )


def _kernels(info: ServerInfo) -> str:
    """What computes, and why it is not something faster."""
    return f"{info.kernels} ({info.kernels_reason})" if info.kernels_reason else info.kernels


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 where the kernel does not tell."""
    if sys.platform != "linux":
        return 0
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0
