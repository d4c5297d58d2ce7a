"""Environments of the peers and of the plot, made the first time and kept.

Each is a virtual environment in one folder with what its requirements file pins; a changed file
makes it anew. transformers and keras-hub are pinned in one place for goldens and measurements.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.peer_process import PeerFailed

_REPOSITORY = Path(__file__).parents[1]
REQUIREMENTS = {
    "keras-hub": _REPOSITORY / "tests/gold/requirements-keras-hub.txt",
    "transformers": _REPOSITORY / "tests/gold/requirements-transformers.txt",
    "llama-cpp": _REPOSITORY / "bench/requirements-llama-cpp.txt",
    "plot": _REPOSITORY / "bench/requirements-plot.txt",
}
_LAST_LINES = 3


def default_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "gemma-service-bench"


def environment(name: str, directory: Path) -> Path:
    """The python of the environment ``name``.

    Raises:
        PeerFailed: Its packages cannot be installed on this machine.
    """
    requirements = REQUIREMENTS[name]
    place = directory / name
    stamp = directory / f"{name}.installed"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    python = place / "bin" / "python"
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return python
    stamp.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", place])
    _run(
        [
            *(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--requirement", requirements),
        ]
    )
    stamp.write_text(wanted)
    return python


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise PeerFailed("not installed: " + " / ".join(lines[-_LAST_LINES:]))
