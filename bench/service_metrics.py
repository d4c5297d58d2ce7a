"""What the service says of itself: `/metrics` and `/info`."""

import time

import httpx

_IDLE_SECONDS = 60.0


def series(text: str, name: str) -> float:
    """The value of one series of Prometheus' text format, its labels as they are written there."""
    line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
    return float(line.split()[-1])


def metrics_text(url: str) -> str:
    return httpx.get(f"{url}/metrics").raise_for_status().text


def metric(url: str, name: str) -> float:
    return series(metrics_text(url), name)


def compilations_while_serving(url: str) -> int:
    """Programs compiled since the service was ready; there should be none."""
    return int(metric(url, 'gemma_compilations_total{phase="serving"}'))


def wait_until_idle(url: str) -> None:
    """Until what an earlier measurement gave up is gone."""
    deadline = time.monotonic() + _IDLE_SECONDS
    while time.monotonic() < deadline:
        running = metric(url, 'gemma_num_requests_running{op="generate"}')
        if running + metric(url, 'gemma_num_requests_waiting{op="generate"}') == 0:
            return
        time.sleep(0.1)
    raise TimeoutError(f"requests were still running after {_IDLE_SECONDS:.0f} s")
