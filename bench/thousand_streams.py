"""A thousand streams over one API process: ``python -m bench.thousand_streams``.

The model is the arithmetic engine, whose step takes as long as it is told to, so whatever the gap
between two tokens of a stream has on top of that is ours: the loop's own work, the frame, the API
process, the sockets and the client. Once with a slot for each stream, and once with 64, where the
rest waits; then a gap is that of a stream that has its slot. Gaps count once all streams are open.
Every token is checked. Prints a Markdown table.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench.service_process import resident_bytes, running_service
from tests.stream_clients import allow_descriptors, bodies_of, check, gaps, stream_all

_NUM_STREAMS = 1000
_CASES = (
    # Name, options, seconds of a step, tokens of a stream.
    ("a slot for each", ("--engine=tests.fakes.many_slots_engine:load",), 0.2, 50),
    ("64 slots", ("--engine=tests.fakes.arithmetic_engine:load", "--slots=64"), 0.1, 25),
)


def measure(name: str, options: tuple[str, ...], step_seconds: float, max_tokens: int) -> str:
    """One row of the table."""
    os.environ["ARITHMETIC_STEP_SECONDS"] = str(step_seconds)
    bodies = bodies_of(_NUM_STREAMS, max_tokens)
    with tempfile.TemporaryDirectory() as directory:
        folders = (f"--data-dir={directory}", f"--cache-dir={directory}", "--preset=x")
        queue = f"--queue-requests={_NUM_STREAMS}"
        with running_service(*options, *folders, queue) as service:
            port = int(service.url.rpartition(":")[2])
            cpu_before, began = _cpu_seconds(service.pid), time.perf_counter()
            streams = asyncio.run(stream_all(port, bodies))
            elapsed = time.perf_counter() - began
            cpu = _cpu_seconds(service.pid) - cpu_before
            memory = resident_bytes(service.pid, "VmHWM")
    for events, body in zip(streams, bodies, strict=True):
        check(events, body)
    all_open = max(events[0].time for events in streams)
    found = sorted(gap for events in streams for gap in gaps(events, all_open))
    p99 = found[int(0.99 * len(found))]
    tokens = _NUM_STREAMS * max_tokens
    return (
        f"| {name} | {1e3 * step_seconds:.0f} ms | {1e3 * statistics.median(found):.0f} ms "
        f"| {1e3 * p99:.0f} ms | {p99 / step_seconds:.2f} × | {1e3 * found[-1]:.0f} ms "
        f"| {tokens / elapsed:,.0f} | {1e6 * cpu / tokens:.0f} µs | {memory / 1e6:.0f} MB |"
    )


def _cpu_seconds(pid: int) -> float:
    """Of user and system, of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    allow_descriptors(_NUM_STREAMS + 200)
    load = Path("/proc/loadavg").read_text().split()[0]
    lines = [
        f"load before: {load}",
        "",
        f"| {_NUM_STREAMS} streams | producer's gap | median gap | p99 gap | to the producer's "
        "| longest gap | tokens/s | API process, CPU a token | its memory, peak |",
        "|---|---|---|---|---|---|---|---|---|",
        *(measure(*case) for case in _CASES),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
