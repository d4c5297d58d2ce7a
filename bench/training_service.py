"""A job of the running service: its memory, its speed, and how soon its versions answer."""

import itertools
import statistics
import time
from collections.abc import Callable

import httpx

from bench import training_jobs
from bench.run_options import stage
from bench.service_process import RunningService, resident_bytes
from bench.training_engine import rows

_ASKED_BYTES = 600e6


def measure_memory(service: RunningService) -> list[str]:
    """The default job: rank 8, query and value, batch_size 8, layout keras; rows of 100 tokens."""
    worker = service.worker_pid()
    stage("memory while the default job trains")
    before, peak_before = resident_bytes(worker), resident_bytes(worker, "VmHWM")
    job = training_jobs.start(service.url, "memory", rows(32, 100, "memory"), layout="keras")
    training_jobs.step_seconds(service.url, job)
    peak = resident_bytes(worker, "VmHWM")
    after = resident_bytes(worker)
    return [
        "| worker, MB | before | peak | grown by | after | asked |",
        "|---|---|---|---|---|---|",
        f"| resident | {before / 1e6:.0f} | {peak / 1e6:.0f} | {(peak - before) / 1e6:.0f} "
        f"| {after / 1e6:.0f} | at most {_ASKED_BYTES / 1e6:.0f} |",
        "",
        f"Its highest before the job, while it started: {peak_before / 1e6:.0f} MB.",
    ]


def measure_service(
    service: RunningService, bare_steps: Callable[[int, int], list[float]], quick: bool
) -> list[str]:
    """Steps of 4 rows of 32 tokens over HTTP, beside the same in a bare loop of this process."""
    over_http: list[float] = []
    bare: list[float] = []
    num_steps = 8
    for _ in range(1 if quick else 3):
        stage("a job over HTTP, and the same in a bare loop")
        job = training_jobs.start(
            service.url, "speed", rows(8, 32, "service"), batch_size=4, steps=num_steps
        )
        over_http += training_jobs.step_seconds(service.url, job)
        bare += bare_steps(4, num_steps)[1:]
    one, other = statistics.median(over_http), statistics.median(bare)
    return [
        "| a step of 4 × 32 tokens | median, ms | tokens/s |",
        "|---|---|---|",
        f"| over HTTP | {one * 1e3:.0f} | {128 / one:.0f} |",
        f"| bare loop | {other * 1e3:.0f} | {128 / other:.0f} |",
        f"| of the bare speed (asked: 0.95) | {other / one:.2f} | |",
    ]


def measure_version(service: RunningService, quick: bool) -> list[str]:
    """A call when each `version` event comes, while the job goes on, and the same call alone."""
    stage("from a version event to an answer")
    url = service.url
    job = training_jobs.start(
        url,
        "soon",
        rows(8, 16, "version"),
        batch_size=2,
        steps=4 if quick else 10,
        learning_rate=0.01,
        publish="every_step",
    )
    seconds, answers = [], []
    for moment, name, data in training_jobs.follow(url, job):
        if name == "version":
            answers.append(_logprob(url, f"gemma:soon@{data['version']}"))
            seconds.append(time.perf_counter() - moment)
    # The last one's job has ended.
    changed = sum(one != other for one, other in itertools.pairwise(answers))
    alone = []
    for _ in range(len(seconds)):
        began = time.perf_counter()
        _logprob(url, "gemma:soon")
        alone.append(time.perf_counter() - began)
    usual, solo = statistics.median(seconds[:-1]), statistics.median(alone)
    return [
        "| from the event to the answer | median, ms | largest |",
        "|---|---|---|",
        f"| while the job goes on, {len(seconds) - 1} versions | {usual * 1e3:.0f} "
        f"| {max(seconds[:-1]) * 1e3:.0f} |",
        f"| the call alone | {solo * 1e3:.0f} | {max(alone) * 1e3:.0f} |",
        f"| more than alone (asked: 50) | {(usual - solo) * 1e3:.0f} | |",
        "",
        f"{changed} of {len(answers) - 1} answers had other log-probabilities than the one before.",
    ]


def _logprob(url: str, model: str) -> float:
    body = {
        "model": model,
        "prompt": [rows(1, 16, "version")[0]],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
    }
    answer = httpx.post(f"{url}/generate", json=body, timeout=120).raise_for_status().json()
    return float(answer["outputs"][0]["logprobs"][0]["logprob"])
