"""What the routes need of the service, handed to them by the application."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, cast

from fastapi import Depends, Request

from service.adapters import AdapterNames, ServedModel
from service.jobs.training import Training
from service.observability import Metrics
from service.protocol.messages import ServerInfo
from service.settings import Settings
from service.worker_client import WorkerClient

NotReadyReason = Literal["loading", "compiling", "draining", "worker_hung", "worker_restarting"]


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether work is taken; if not, why, and how much of the loading is done (0 to 1)."""

    reason: NotReadyReason | None = None
    progress: float | None = None


class WorkerView(Protocol):
    """What may be asked about the worker without asking the worker."""

    @property
    def info(self) -> ServerInfo | None:
        """What is loaded, from the first time it is ready."""

    def readiness(self) -> Readiness: ...

    def refresh_gauges(self, metrics: Metrics) -> None:
        """Sets the gauges that are only known when asked for."""


@dataclass(frozen=True, slots=True)
class ServiceState:
    """Everything that a route may use."""

    settings: Settings
    worker: WorkerClient
    view: WorkerView
    metrics: Metrics
    adapters: AdapterNames = field(default_factory=AdapterNames)
    training: Training | None = None

    def trained(self) -> Training:
        """Jobs and versions, which every service has; a document of the contract has none."""
        assert self.training is not None, "this application was made without a data folder"
        return self.training

    def model(self, name: str | None) -> ServedModel:
        """What a request names; the base if it names nothing.

        Raises:
            ModelNotFound: Nothing has that name.
        """
        return self.adapters.resolve(self.settings.served_name, name)


# Async, or FastAPI would call it in a thread of a pool, for every request.
async def _state(request: Request) -> ServiceState:
    return cast(ServiceState, request.app.state.service)


State = Annotated[ServiceState, Depends(_state)]
