"""Writes the OpenAPI document: ``python -m service.export_openapi openapi/openapi.json``."""

import json
import sys
from pathlib import Path
from typing import Any

from service.api.state import Readiness, ServiceState
from service.app import create_app
from service.observability import Metrics
from service.protocol.messages import Command, ServerInfo
from service.settings import Settings
from service.worker_client import WorkerClient


class NoWorker:
    """Stands in for the worker where only the contract is asked for."""

    info: ServerInfo | None = None

    def readiness(self) -> Readiness:
        return Readiness("loading", 0.0)

    def refresh_gauges(self, metrics: Metrics) -> None:
        """There is nothing to measure."""


def document() -> dict[str, Any]:
    """The contract of the application with default settings."""

    def send(command: Command) -> None:
        raise AssertionError("there is no worker")

    state = ServiceState(Settings(), WorkerClient(send), NoWorker(), Metrics())
    return create_app(state).openapi()


def main() -> None:
    text = json.dumps(document(), indent=2, sort_keys=True, ensure_ascii=False)
    Path(sys.argv[1]).write_text(text + "\n")


if __name__ == "__main__":
    main()
