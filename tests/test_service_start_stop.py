"""The whole service's life: loading, signals, exit statuses, and nothing left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from service.settings import Settings
from tests.goldens import preset_directory
from tests.service_process import (
    REPOSITORY,
    command,
    eventually,
    has_ended,
    own_environment,
    running_service,
)

SLOW_STEPS = {"ARITHMETIC_STEP_SECONDS": "0.05"}


def run(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command that ends by itself."""
    return subprocess.run(
        words,
        cwd=REPOSITORY,
        env={**own_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_while_it_loads_it_is_alive_and_not_ready_and_says_how_far_it_is(tmp_path):
    with running_service(tmp_path, is_ready=False, ARITHMETIC_LOAD_SECONDS="1.5") as service:
        assert eventually(lambda: '"progress"' in service.log)
        assert service.get("/health").json() == {"status": "ok"}
        ready = service.get("/ready")
        assert ready.status_code == 503
        assert ready.json() == {"ready": False, "reason": "loading", "progress": 0.0}
        assert ready.headers["retry-after"] == "1"
        for stream in (False, True):
            refusal = service.generate([1], stream=stream)
            assert (refusal.status_code, refusal.json()["code"]) == (503, "loading")
            assert refusal.headers["retry-after"] == "5"
        info = service.get("/info")
        assert (info.status_code, info.json()["code"]) == (503, "loading")
        assert service.metric("gemma_ready") == 0
        assert eventually(service.is_ready)
        assert service.get("/ready").json() == {"ready": True}
        assert service.metric("gemma_ready") == 1
        assert service.get("/info").json()["family"] == "arithmetic"


def test_the_api_process_loads_neither_jax_nor_numpy_nor_the_model(tmp_path):
    program = (
        "import sys, service.__main__, service.runtime\n"
        "from pathlib import Path\n"
        "from service.adapters import AdapterNames\n"
        "from service.jobs.folders import Folders\n"
        "from service.jobs.store import Store\n"
        "from service.jobs.training import DataFiles\n"
        "from service.settings import Settings\n"
        "from service.startup_display import startup_display\n"
        f"files = DataFiles(Store(Path('{tmp_path}/x.sqlite')), Folders(Path('{tmp_path}')))\n"
        "parts = (Settings(), 'http://x', startup_display(), AdapterNames(), files)\n"
        "service.runtime.Service(*parts).app.openapi()\n"
        "files.store.close()\n"
        "print(*sys.modules, sep='\\n')\n"
    )
    loaded = {name.partition(".")[0] for name in run(sys.executable, "-c", program).stdout.split()}
    assert "fastapi" in loaded
    assert loaded & {"jax", "jaxlib", "keras", "numpy", "model", "ml_dtypes"} == set()

    with running_service(tmp_path) as service:
        assert service.generate([1], max_tokens=1).status_code == 200
        maps = Path(f"/proc/{service.process.pid}/maps").read_text()
        assert "pydantic_core" in maps
        assert "jaxlib" not in maps
        assert "numpy" not in maps


def test_f_r13_sigterm_lets_a_running_stream_finish_and_leaves_nothing(tmp_path):
    with running_service(tmp_path, **SLOW_STEPS) as service:
        worker = service.worker()
        with service.stream([1], max_tokens=20) as stream:
            assert next(stream)["event"] == "start"
            service.process.send_signal(signal.SIGTERM)
            *tokens, done = stream
        assert done["event"] == "done"
        assert sum(len(event["data"]["token_ids"]) for event in tokens) == 20
        assert service.process.wait(5) == 0
        assert has_ended(worker)
        with pytest.raises(httpx.ConnectError):
            service.get("/health")


def test_while_it_drains_it_is_not_ready_and_refuses_new_work(tmp_path):
    with running_service(tmp_path, **SLOW_STEPS) as service:
        with service.stream([1], max_tokens=20) as stream:
            assert next(stream)["event"] == "start"
            service.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: not service.is_ready(), 0.5)
            assert service.get("/ready").json() == {"ready": False, "reason": "draining"}
            for is_streamed in (False, True):
                refusal = service.generate([1], stream=is_streamed)
                assert (refusal.status_code, refusal.json()["code"]) == (503, "draining")
                assert refusal.headers["retry-after"] == "5"
            *_, done = stream
        assert done["event"] == "done"


@pytest.mark.parametrize("num_signals", [1, 2])
def test_what_runs_when_the_drain_time_is_over_or_cut_short_ends_with_a_problem(
    tmp_path, num_signals
):
    drain_seconds = 0.5 if num_signals == 1 else 60.0
    option = f"--drain-seconds={drain_seconds}"
    with running_service(tmp_path, option, **SLOW_STEPS) as service:
        with service.stream([5], max_tokens=3000) as stream:
            assert next(stream)["event"] == "start"
            stopped_at = time.monotonic()
            for _ in range(num_signals):
                service.process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            *_, last = stream
        assert 0.2 <= time.monotonic() - stopped_at < 2
        assert (last["event"], last["data"]["code"]) == ("error", "draining")
        assert service.process.wait(5) == 0
        assert "Traceback" not in service.log


def test_sigint_to_the_process_group_stops_the_api_and_the_worker_only_after_it(tmp_path):
    with running_service(tmp_path, **SLOW_STEPS) as service:
        worker = service.worker()
        with service.stream([1], max_tokens=20) as stream:
            assert next(stream)["event"] == "start"
            os.killpg(service.process.pid, signal.SIGINT)
            *_, done = stream
        assert done["event"] == "done"
        assert service.process.wait(5) == 0
        assert has_ended(worker)


def test_sigterm_while_loading_ends_at_once(tmp_path):
    with running_service(tmp_path, is_ready=False, ARITHMETIC_LOAD_SECONDS="60") as service:
        assert eventually(lambda: '"progress"' in service.log)
        worker = service.worker()
        start = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(5) == 0
        assert time.monotonic() - start < 2
        assert has_ended(worker)


def test_a_killed_api_process_takes_its_worker_with_it_in_the_middle_of_a_step(tmp_path):
    with running_service(tmp_path, ARITHMETIC_STEP_SECONDS="30") as service:
        worker = service.worker()
        with service.stream([1]) as stream:
            assert next(stream)["event"] == "start"
            service.process.kill()
            assert eventually(lambda: has_ended(worker), 1)
            with pytest.raises(httpx.RemoteProtocolError):
                next(stream)


def test_a_second_service_on_the_same_folder_or_port_is_told_so_in_one_line(tmp_path):
    with running_service(tmp_path) as service:
        same_folder = run(*command(tmp_path))
        assert same_folder.returncode == 75
        assert same_folder.stderr == (
            f"gemma-service: Another service uses {tmp_path}. "
            "Stop it, or set GEMMA_DATA_DIR to another folder.\n"
        )
        same_port = run(*command(tmp_path / "other"), f"--port={service.port}")
        assert same_port.returncode == 98
        assert same_port.stderr == (
            f"gemma-service: cannot listen on 127.0.0.1:{service.port}: Address already in use. "
            "Choose another with --host and --port.\n"
        )
        assert service.generate([1], max_tokens=1).status_code == 200


def test_the_folder_and_the_port_are_free_again_after_a_kill(tmp_path):
    with running_service(tmp_path) as first:
        first.process.kill()
        first.process.wait()
        with running_service(tmp_path, f"--port={first.port}") as second:
            assert second.port == first.port


@pytest.mark.parametrize(
    ("options", "environment", "named"),
    [
        (["--no-such-option", "3"], {}, "--no-such-option"),
        (["--slots", "0"], {}, "--slots (or GEMMA_SLOTS)"),
        (["--slots"], {}, "--slots"),
        ([], {"GEMMA_SLOTS": "many"}, "--slots (or GEMMA_SLOTS)"),
        ([], {"GEMMA_PING_SECONDS": "nan"}, "--ping-seconds (or GEMMA_PING_SECONDS)"),
        ([], {"GEMMA_ENGINE": "os.system"}, "--engine (or GEMMA_ENGINE)"),
    ],
)
def test_a_bad_setting_is_status_64_and_one_line_that_names_it(options, environment, named):
    result = run(sys.executable, "-m", "service", "serve", *options, **environment)
    assert result.returncode == 64
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("gemma-service: ")
    assert named in line


@pytest.mark.parametrize(
    ("words", "status", "begins"),
    [
        (["--version"], 0, "gemma-service 0.1.0"),
        (["--help"], 0, "usage: gemma-service COMMAND"),
        (["serve", "--help"], 0, "usage: gemma-service serve"),
    ],
)
def test_help_and_version_are_printed_and_nothing_else_happens(words, status, begins):
    result = run(sys.executable, "-m", "service", *words)
    assert result.returncode == status
    assert result.stdout.startswith(begins)
    assert result.stderr == ""


@pytest.mark.parametrize("words", [[], ["sevre"], ["serve-now"]])
def test_a_wrong_command_is_status_64(words):
    result = run(sys.executable, "-m", "service", *words)
    assert result.returncode == 64
    assert "gemma-service" in result.stderr
    assert result.stdout == ""


def test_a_folder_that_cannot_be_made_is_status_73(tmp_path):
    (tmp_path / "file").touch()
    result = run(*command(tmp_path / "file" / "folder"))
    assert result.returncode == 73
    [line] = result.stderr.splitlines()
    assert line.startswith(f"gemma-service: cannot use {tmp_path}/file")


def test_an_unknown_preset_of_the_real_engine_is_status_65_and_one_clear_line(tmp_path):
    words = command(tmp_path, "--preset=nope", "--engine=model.engine:load")
    result = run(*words, JAX_PLATFORMS="cpu")
    assert result.returncode == 65
    assert "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("{")]
    assert line.startswith("gemma-service: ")
    assert "nope" in line


def test_a_truncated_preset_is_status_65_and_one_line_that_names_the_file(tmp_path):
    whole = preset_directory("gemma1_tiny")
    shutil.copytree(whole, tmp_path / "preset")
    weights = tmp_path / "preset" / "model.weights.h5"
    weights.write_bytes(weights.read_bytes()[:100_000])
    words = command(tmp_path, f"--preset={tmp_path / 'preset'}", "--engine=model.engine:load")
    result = run(*words, JAX_PLATFORMS="cpu")
    assert result.returncode == 65
    assert "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("{")]
    assert "model.weights.h5" in line


@pytest.mark.parametrize(
    ("settings", "served"),
    [
        ({}, True),
        ({"host": "::1"}, True),
        ({"host": "localhost"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "example.org"}, False),
        ({"host": "0.0.0.0", "docs": True}, True),
        ({"docs": False}, False),
    ],
)
def test_the_documents_are_served_to_this_machine_only_unless_asked_for(settings, served):
    assert Settings(**settings).serves_docs is served
