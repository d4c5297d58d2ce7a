"""A service started for a measurement, and what its processes hold."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

_READY_SECONDS = 900


@dataclass(frozen=True, slots=True)
class RunningService:
    """A service that is ready."""

    url: str
    pid: int
    ready_after_seconds: float

    def worker_pid(self) -> int:
        """The only child of the API process."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(children[0])


@contextmanager
def running_service(*options: str) -> Iterator[RunningService]:
    """Starts ``gemma-service serve`` on a free port, waits until it is ready, and stops it."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url)
        yield RunningService(url, process.pid, time.perf_counter() - started)
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(process: "subprocess.Popen[str]", url: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the service ended while it was starting"
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise TimeoutError("the service was not ready in time")


def resident_bytes(pid: int, kind: str = "VmRSS") -> int:
    """Resident memory (``VmRSS``) or its peak (``VmHWM``)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"the kernel tells no {kind}")
