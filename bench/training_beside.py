"""Four streams and four jobs, each alone and beside each other: what is kept of both speeds."""

import asyncio
import statistics
import threading
import time
from collections.abc import Sequence

from bench import training_jobs
from bench.run_options import stage
from bench.service_process import RunningService
from bench.streams import Ask, Record, together
from bench.summary import percentile, token_gaps
from bench.training_engine import rows

_STREAMS = 4
_JOBS = 4
_PROMPT_TOKENS = 16
_ROW_TOKENS = 32


class _Jobs:
    """Jobs that train until they are cancelled, and when they made steps."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.steps: list[list[tuple[float, int]]] = [[] for _ in range(_JOBS)]
        self._ids = [
            training_jobs.start(
                url, f"beside{n}", rows(64, _ROW_TOKENS, f"{n}"), batch_size=2, steps=5000
            )
            for n in range(_JOBS)
        ]
        self._threads = [
            threading.Thread(target=self._follow, args=each)
            for each in zip(self._ids, self.steps, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _follow(self, job: str, steps: list[tuple[float, int]]) -> None:
        for moment, name, data in training_jobs.follow(self._url, job):
            if name == "step":
                steps.append((moment, int(data["tokens"])))

    def tokens_per_second(self, begin: float, end: float) -> float:
        """Each job from its first step to its last one in between: they end steps together, and
        seldom, so that counting those of a span would be a matter of luck.
        """
        return sum(
            step_rate([step for step in steps if begin < step[0] <= end]) for steps in self.steps
        )

    def wait_for_steps(self) -> None:
        while any(len(steps) < 2 for steps in self.steps):
            time.sleep(0.1)

    def cancel(self) -> None:
        for each in self._ids:
            training_jobs.cancel(self._url, each)
        for thread in self._threads:
            thread.join()


def step_rate(steps: Sequence[tuple[float, int]]) -> float:
    """Tokens a second, from the end of the first step on."""
    assert len(steps) > 1, "the span is too short for two steps of every job"
    (began, _), *others = steps
    return sum(count for _, count in others) / (others[-1][0] - began)


def _streams(url: str, num_tokens: int) -> tuple[list[Record], float, float]:
    prompts = rows(_STREAMS, _PROMPT_TOKENS, "streams")
    began = time.perf_counter()
    records = asyncio.run(together(url, [Ask(tuple(one), num_tokens) for one in prompts]))
    return records, began, time.perf_counter()


def _speed(records: list[Record]) -> tuple[float, float]:
    """Tokens a second behind the first ones, and the 99th percentile of the gaps."""
    began = min(record.arrivals[0][0] for record in records)
    ended = max(record.arrivals[-1][0] for record in records)
    tokens = sum(len(record.token_ids) - record.arrivals[0][1] for record in records)
    gaps = [gap for record in records for gap in token_gaps(record)]
    return tokens / (ended - began), percentile(gaps, 99)


def measure_serving(service: RunningService, quick: bool) -> list[str]:
    """Streams alone, both, jobs alone."""
    url, num_tokens = service.url, 192 if quick else 384
    _streams(url, 16)
    stage("four streams alone")
    alone, alone_p99 = _speed(_streams(url, num_tokens)[0])
    jobs = _Jobs(url)
    try:
        jobs.wait_for_steps()
        stage("four streams beside four jobs")
        records, began, ended = _streams(url, num_tokens)
        beside, beside_p99 = _speed(records)
        trained_beside = jobs.tokens_per_second(began, ended)
        stage("four jobs alone")
        began = time.perf_counter()
        time.sleep(20 if quick else 40)
        trained_alone = jobs.tokens_per_second(began, time.perf_counter())
    finally:
        jobs.cancel()
    stage("four streams alone again")
    again, again_p99 = _speed(_streams(url, num_tokens)[0])
    usual, usual_p99 = statistics.fmean([alone, again]), statistics.fmean([alone_p99, again_p99])
    kept, trained = beside / usual, trained_beside / trained_alone
    return [
        "| | alone | beside each other | kept |",
        "|---|---|---|---|",
        f"| four streams, tokens/s | {usual:.1f} | {beside:.1f} | {kept:.2f} |",
        f"| four jobs, tokens/s | {trained_alone:.1f} | {trained_beside:.1f} | {trained:.2f} |",
        f"| both shares (asked: 0.95) | | | {kept + trained:.2f} |",
        f"| gap of a stream, p99, ms (asked: 2 ×) | {usual_p99 * 1e3:.0f} "
        f"| {beside_p99 * 1e3:.0f} | {beside_p99 / usual_p99:.2f} × |",
    ]
