"""Starts the real service, API process and worker process, on the arithmetic engine."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

REPOSITORY = Path(__file__).parent.parent
ENGINE = "tests.fakes.arithmetic_engine:load"


def command(directory: Path, *options: str) -> list[str]:
    """The command line of a service that keeps its files in ``directory``."""
    words = [sys.executable, "-m", "service", "serve", "--port=0", f"--engine={ENGINE}"]
    return [*words, "--preset=x", f"--data-dir={directory}", f"--cache-dir={directory}", *options]


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether ``condition`` becomes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more; in a container nobody may ever collect its status."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class ServiceProcess:
    """A service that listens; it may still be loading."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        assert process.stdout is not None
        self.process = process
        self.port: int = json.loads(process.stdout.readline())["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=20)
        self._log = log

    @property
    def log(self) -> str:
        """Standard error so far."""
        return self._log.read_text()

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)

    def generate(self, prompt: Any, **fields: Any) -> httpx.Response:
        """POST /generate, greedy unless told otherwise."""
        return self.client.post("/generate", json={"prompt": prompt, "temperature": 0.0, **fields})

    @contextlib.contextmanager
    def stream(self, prompt: Any, **fields: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of a streamed POST /generate, as they come."""
        body = {"prompt": prompt, "temperature": 0.0, "stream": True, **fields}
        with self.client.stream("POST", "/generate", json=body) as response:
            assert response.status_code == 200, response.read()
            yield events(response.iter_lines())

    def metric(self, name: str) -> float:
        """The value of one series, written as in the text format."""
        lines = self.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).split()[-1])

    def is_ready(self) -> bool:
        return self.get("/ready").status_code == 200

    def worker(self) -> psutil.Process:
        """The worker process; there must be exactly one."""
        [worker] = psutil.Process(self.process.pid).children()
        return worker


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Server-sent events: their name, id and data; a comment is an event named ``:``."""
    event: dict[str, Any] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line == "":
            yield event
            event = {}
        elif line.startswith(":"):
            event = {"event": ":", "text": line}
        else:
            assert name in {"event", "id", "data"} - event.keys(), line
            event[name] = json.loads(value) if name == "data" else value
    assert event == {}, "the stream ends in the middle of an event"


def own_environment() -> dict[str, str]:
    """That of this process, but for what only tests know: a service would warn of the name."""
    return {name: value for name, value in os.environ.items() if name != "GEMMA_TEST_CACHE_DIR"}


@contextlib.contextmanager
def running_service(
    directory: Path, *options: str, is_ready: bool = True, **environment: str
) -> Iterator[ServiceProcess]:
    """A service with these options and variables, waited for until it is ready.

    It is the leader of a process group of its own, as in a terminal.
    """
    directory.mkdir(exist_ok=True)
    log = directory / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command(directory, *options),
            cwd=REPOSITORY,
            env={**own_environment(), **environment},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    try:
        service = ServiceProcess(process, log)
        with service.client:
            if is_ready:
                assert eventually(service.is_ready, 20), service.log
            yield service
    finally:
        process.kill()
        process.communicate()
