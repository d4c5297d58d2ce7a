"""What was measured, kept as JSON; a part that is measured again replaces itself and nothing else.

Each part carries the run that it came from, so figures of several runs can stand on one page
without being taken for one.
"""

import json
import math
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).parents[1]


def describe_run(*, quick: bool) -> dict[str, Any]:
    """When, where and what; the load is that of the minute before."""
    return {
        "began": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "quick": quick,
        "load_before": os.getloadavg()[0],
        "commit": _commit(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "jax": version("jax"),
    }


def _commit() -> str:
    """Of the repository, or nothing where it is no repository; a ``+`` says: and changes."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def read(path: Path) -> dict[str, Any]:
    """What is kept so far, by part."""
    if not path.exists():
        return {}
    parts: dict[str, Any] = json.loads(path.read_text())
    return parts


def keep(path: Path, part: str, run: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Writes one part at once, so that what comes later can fail without taking it along."""
    entry = {"run": run, "load_after": os.getloadavg()[0], "result": _without_nan(result)}
    parts = {**read(path), part: entry}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(parts, indent=1) + "\n")
    unfinished.replace(path)
    return parts


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: a figure that nothing was measured for is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return value
