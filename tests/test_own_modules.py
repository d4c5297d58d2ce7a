"""Folders called like our packages, where a person stands, are never run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(sys.executable).with_name("gemma-service")


@pytest.fixture
def trap(tmp_path):
    """A folder with a ``service`` and a ``model`` that leave a trace when they are imported."""
    folder = tmp_path / "trap"
    for package in ("service", "model"):
        (folder / package).mkdir(parents=True)
        code = f"open({str(tmp_path / 'sprung')!r}, 'w').close()\nraise SystemExit(3)\n"
        (folder / package / "__init__.py").write_text(code)
    return folder


@pytest.fixture
def environment(tmp_path):
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    kept["GEMMA_CACHE_DIR"] = str(tmp_path / "cache")
    return {**kept, "GEMMA_DATA_DIR": str(tmp_path / "data")}


def test_the_trap_works(trap, tmp_path):
    done = subprocess.run([sys.executable, "-m", "service"], cwd=trap, capture_output=True)
    assert done.returncode == 3
    assert (tmp_path / "sprung").exists()


def test_a_command_and_its_processes_run_our_modules(trap, tmp_path, environment):
    words = ["export", "tiny", str(tmp_path / "out"), "--format", "keras"]
    done = subprocess.run([SCRIPT, *words], cwd=trap, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "sprung").exists()


def test_a_worker_runs_our_modules(trap, tmp_path, environment):
    words = ["serve", "--port", "0", "--preset", "tiny", "--context-tokens", "256", "--slots", "2"]
    with subprocess.Popen(
        [SCRIPT, *words], cwd=trap, env=environment, stderr=subprocess.PIPE, text=True
    ) as service:
        assert service.stderr is not None
        # Two processes write: where the service listens, which kernels there are, how far it is.
        lines = [json.loads(service.stderr.readline()) for _ in range(4)]
        service.kill()
    assert "progress" in {line.get("event") for line in lines}
    assert not (tmp_path / "sprung").exists()
