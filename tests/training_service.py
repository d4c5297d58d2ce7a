"""The real application over a scripted trainer, a real database and a real socket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from service.adapters import AdapterNames
from service.api.state import Readiness, ServiceState
from service.app import create_app
from service.jobs.folders import Folders
from service.jobs.store import FILE_NAME, Store
from service.jobs.training import DataFiles, open_training
from service.observability import Metrics
from service.protocol.messages import ServerInfo
from service.settings import Settings
from service.worker_client import WorkerClient
from tests.fakes.scripted_trainer import ScriptedTrainer

PRESET = "sha256:" + "1" * 64
INFO = ServerInfo(
    preset="x",
    preset_digest=PRESET,
    family="arithmetic",
    is_instruct=False,
    num_parameters=0,
    dtype="int",
    backend="python",
    device="cpu",
    kernels="none",
    kernels_reason=None,
    context_tokens=64,
    num_slots=4,
    vocabulary_size=1000,
    num_layers=1,
    hidden_dim=1,
    buckets={},
    programs=(),
    has_tokenizer=True,
    self_test=None,
    adapter_slots=4,
    adapter_max_rank=16,
)


class ReadyView:
    info: ServerInfo | None = INFO

    def readiness(self) -> Readiness:
        return Readiness()

    def refresh_gauges(self, metrics: Metrics) -> None:
        """There is nothing to measure."""


class TrainingService:
    """One life of a service over a data folder."""

    def __init__(self, directory: Path, names: AdapterNames | None = None, **settings: Any) -> None:
        self.settings = Settings(data_dir=directory, **settings)
        self.store = Store(directory / FILE_NAME)
        self.names = names or AdapterNames()
        self.metrics = Metrics()
        self.worker = ScriptedTrainer(lambda event: self.training.jobs.deliver(event))
        self.training = open_training(
            DataFiles(self.store, Folders(directory)),
            self.settings,
            self.names,
            self.metrics,
            lambda command: self.worker.send(command),
            lambda digest: False,
        )
        client = WorkerClient(print)
        state = ServiceState(
            self.settings, client, ReadyView(), self.metrics, self.names, self.training
        )
        self.app = create_app(state)

    def restart_worker(self, preset_digest: str = PRESET) -> None:
        """The worker dies with all that it knew, and another one is ready."""
        self.training.jobs.worker_lost()
        self.worker = ScriptedTrainer(lambda event: self.training.jobs.deliver(event))
        self.training.jobs.worker_ready(preset_digest)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client of a real server, and a worker that is ready."""
        self.training.jobs.worker_ready(PRESET)
        working = asyncio.create_task(self.training.jobs.run())
        config = uvicorn.Config(self.app, port=0, http="h11", log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 (uvicorn offers no event to wait on)
            await asyncio.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        try:
            async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
                yield client
        finally:
            server.should_exit = True
            await serving
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await self.training.versions.close()
            self.store.close()


async def until(condition: Any) -> None:
    """Waits for what an awaitable of a boolean becomes."""
    async with asyncio.timeout(5):
        while not await condition():  # noqa: ASYNC110 (a table has no event)
            await asyncio.sleep(0.01)
