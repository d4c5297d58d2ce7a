"""The whole service when its worker dies or hangs: who is told, and how soon it is back."""

import re
import time

import psutil
import pytest

from tests.service_process import ServiceProcess, eventually, running_service

# The prompt [5] is continued by 5, 10, 20, …, for ever.
STEP = {"ARITHMETIC_STEP_SECONDS": "0.02"}
NOT_FINITE, RAISE, EXIT, HANG = 901, 902, 903, 904


def assert_serves_again(service: ServiceProcess) -> None:
    """Ready within a few seconds, with a new worker, and with right answers."""
    assert eventually(service.is_ready, 10), service.log
    [output] = service.generate([1], max_tokens=4).json()["outputs"]
    assert output["token_ids"] == [1, 2, 4, 8]
    assert service.metric("gemma_worker_restarts_total") == 1
    assert service.process.poll() is None


def test_a_killed_worker_ends_its_streams_with_an_error_and_is_replaced(tmp_path):
    with running_service(tmp_path, **STEP) as service, service.stream([5], max_tokens=3000) as s:
        assert [next(s)["event"], next(s)["event"]] == ["start", "token"]
        killed_at = time.monotonic()
        service.worker().kill()
        *_, last = s
        assert time.monotonic() - killed_at < 2
        assert (last["event"], last["data"]["code"]) == ("error", "worker_restarting")
        assert last["data"]["retry_after_s"] == 2
        ready = service.get("/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "worker_restarting")
        refusal = service.generate([1])
        assert (refusal.status_code, refusal.json()["code"]) == (503, "worker_restarting")
        assert refusal.headers["retry-after"] == "2"
        assert_serves_again(service)
        assert "SIGKILL (out of memory?)" in service.log


@pytest.mark.parametrize(
    ("token", "told"), [(EXIT, "exit status 3"), (RAISE, "exit status 70")], ids=["exit", "raise"]
)
def test_a_step_that_ends_the_worker_fails_all_that_it_held_and_no_more(tmp_path, token, told):
    with running_service(tmp_path, **STEP) as service, service.stream([5], max_tokens=3000) as s:
        assert [next(s)["event"], next(s)["event"]] == ["start", "token"]
        poison = service.generate([token])
        assert (poison.status_code, poison.json()["code"]) == (503, "worker_restarting")
        *_, last = s
        assert (last["event"], last["data"]["code"]) == ("error", "worker_restarting")
        assert_serves_again(service)
        assert told in service.log


def test_what_makes_the_engine_fail_is_a_prompt_never_a_draw(tmp_path):
    with running_service(tmp_path) as service:
        for token in (NOT_FINITE, RAISE, EXIT, HANG):
            [output] = service.generate([token - 450, 450], max_tokens=2).json()["outputs"]
            assert output["token_ids"] == [token, 2 * token % 1000]


def test_f_r11_a_worker_that_hangs_is_replaced_and_leaves_its_stacks_in_the_log(tmp_path):
    options = "--step-timeout-seconds=1"
    with running_service(tmp_path, options, **STEP) as service:
        start = time.monotonic()
        with service.stream([HANG]) as stream:
            *_, last = stream
        assert 1 < time.monotonic() - start < 4
        assert (last["event"], last["data"]["code"]) == ("error", "worker_restarting")
        assert_serves_again(service)
        assert "the worker hangs" in service.log
        assert "in _misbehave" in service.log


def test_f_r11_a_worker_that_is_stopped_from_outside_is_not_ready_once_it_gives_no_sign(tmp_path):
    with running_service(tmp_path) as service:
        worker = service.worker()
        worker.suspend()
        heartbeat_age = "gemma_worker_heartbeat_age_seconds"
        assert eventually(lambda: service.metric(heartbeat_age) > 0.6, 2)
        assert service.get("/health").json() == {"status": "ok"}
        worker.resume()
        assert eventually(lambda: service.metric(heartbeat_age) < 0.5, 2)
        assert service.generate([1], max_tokens=1).status_code == 200


def test_repeated_deaths_wait_twice_as_long_each_time(tmp_path):
    with running_service(tmp_path) as service:
        for _ in range(2):
            assert eventually(service.is_ready, 10)
            service.generate([EXIT])
        died_at = time.monotonic()
        assert eventually(service.is_ready, 10)
        assert time.monotonic() - died_at > 1.0
        assert re.findall(r"starting it again in ([0-9.]+) s", service.log) == ["0.5", "1.0"]
        # The API process lived through it all, and holds one worker.
        assert len(psutil.Process(service.process.pid).children()) == 1
