"""What Prometheus sees.

Labels come from closed sets only, and every label set exists at zero from the start, so that a rate
over a counter is right from its first event. The worker counts in plain numbers; only this process
holds prometheus objects, so a restarted worker never turns a counter back.
"""

import time
from collections.abc import Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import DeadlineExceeded, RequestCancelled, leaves

# A second series for every counter, with the time of its creation, which nobody asked for.
disable_created_metrics()

# vLLM's buckets, so that a dashboard ports by its prefix.
_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_FINISH_REASONS = ("stop", "length", "timeout", "cancelled")
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
_ROUTES = (
    "/generate",
    "/score",
    "/finetune",
    "/adapters",
    "/health",
    "/ready",
    "/info",
    "/metrics",
    "/openapi.json",
    "/docs",
)
_OTHER = "other"
# Of a score there is no reason to end but that everything is known.
_DONE = "stop"
_GENERATE = "generate"
_SCORE = "score"
_FINETUNE = "finetune"
_OPERATIONS = (_GENERATE, _SCORE, _FINETUNE)
# Of jobs that have not ended.
_JOB_STATES = ("queued", "running", "paused")
_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_ROW_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
# Of versions: in the bank, in the worker's memory, in a file.
ADAPTER_STATES = ("resident", "host", "disk")
_BASE = "base"
# Names come and go, so that a label for each would have no end.
_ADAPTER = "adapter"
_ADAPTERS = (_BASE, _ADAPTER)


class Metrics:
    """Every metric of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.http_requests = Counter(
            "gemma_http_requests",
            "HTTP requests by route, method and status.",
            ("route", "method", "status"),
            registry=registry,
        )
        self.requests_running = Gauge(
            "gemma_num_requests_running", "Requests that hold a slot.", ("op",), registry=registry
        )
        self.requests_waiting = Gauge(
            "gemma_num_requests_waiting", "Requests without a slot.", ("op",), registry=registry
        )
        self.queue_tokens = Gauge(
            "gemma_queue_tokens", "Prompt tokens that wait for a slot.", registry=registry
        )
        self.prompt_tokens = Counter(
            "gemma_prompt_tokens", "Prompt tokens taken.", ("op", "adapter"), registry=registry
        )
        self.cached_tokens = Counter(
            "gemma_prefix_cached_tokens",
            "Prompt tokens that an earlier prompt had left.",
            ("adapter",),
            registry=registry,
        )
        self.generation_tokens = Counter(
            "gemma_generation_tokens", "Tokens generated.", ("adapter",), registry=registry
        )
        self.successes = Counter(
            "gemma_request_success",
            "Outputs that ended normally.",
            ("op", "finished_reason"),
            registry=registry,
        )
        self.failures = Counter(
            "gemma_request_failure", "Requests that failed.", ("op", "code"), registry=registry
        )
        self.cancelled = Counter(
            "gemma_cancelled", "Requests given up.", ("reason",), registry=registry
        )
        self.computed_tokens = Counter(
            "gemma_computed_tokens",
            "Tokens that programs computed.",
            ("work", "use"),
            registry=registry,
        )
        self.first_token = Histogram(
            "gemma_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            ("streaming",),
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "gemma_inter_token_latency_seconds",
            "Between two tokens of one output.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self.e2e = Histogram(
            "gemma_e2e_request_latency_seconds",
            "From the request's arrival to its last token.",
            ("op",),
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.queue_time = Histogram(
            "gemma_request_queue_time_seconds",
            "From admission to the first slot.",
            ("op",),
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.compilations = Counter(
            "gemma_compilations",
            "Programs compiled by JAX; while serving there must be none.",
            ("phase",),
            registry=registry,
        )
        self.adapters = Gauge(
            "gemma_adapters",
            "Versions of adapters by where they are.",
            ("state",),
            registry=registry,
        )
        self.adapter_loads = Counter(
            "gemma_adapter_loads", "Adapters written into the bank.", registry=registry
        )
        self.adapter_evictions = Counter(
            "gemma_adapter_evictions", "Adapters put out of the bank for others.", registry=registry
        )
        self.train_share = Gauge(
            "gemma_train_share_ratio", "Share of the worker's time for training.", registry=registry
        )
        self.adapter_publish = Histogram(
            "gemma_adapter_publish_seconds",
            "From the news of a version to its name.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self.train_jobs = Gauge(
            "gemma_train_jobs", "Jobs that have not ended.", ("state",), registry=registry
        )
        self.storage_paused_jobs = Gauge(
            "gemma_storage_paused_jobs", "Jobs that wait for room on the disk.", registry=registry
        )
        self.train_steps = Counter("gemma_train_steps", "Steps of optimizers.", registry=registry)
        self.train_tokens = Counter(
            "gemma_train_tokens", "Tokens that were learned from.", registry=registry
        )
        self.train_step = Histogram(
            "gemma_train_step_seconds",
            "Of one step of a job.",
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self.train_rows = Histogram(
            "gemma_train_rows_per_step",
            "Rows of one step of a job.",
            buckets=_ROW_BUCKETS,
            registry=registry,
        )
        self.heartbeat_age = Gauge(
            "gemma_worker_heartbeat_age_seconds",
            "Since the worker's last sign of life.",
            registry=registry,
        )
        self.worker_restarts = Counter(
            "gemma_worker_restarts", "Workers that died or hung.", registry=registry
        )
        self.ready = Gauge("gemma_ready", "1 while work is taken.", registry=registry)
        self.resident_bytes = Gauge(
            "gemma_process_resident_memory_bytes",
            "Resident memory.",
            ("process",),
            registry=registry,
        )
        self.build_info = Gauge(
            "gemma_build_info",
            "What is served; the value is 1.",
            ("version", "model", "dtype", "backend", "kernels", "quantization"),
            registry=registry,
        )
        self._create_label_sets()

    def _create_label_sets(self) -> None:
        for operation in _OPERATIONS:
            for metric in (self.requests_running, self.requests_waiting, self.e2e, self.queue_time):
                metric.labels(operation)
            for adapter in _ADAPTERS:
                self.prompt_tokens.labels(operation, adapter)
            for error in leaves():
                self.failures.labels(operation, error.code)
        for adapter in _ADAPTERS:
            self.cached_tokens.labels(adapter)
            self.generation_tokens.labels(adapter)
        for reason in _FINISH_REASONS:
            self.successes.labels(_GENERATE, reason)
        self.successes.labels(_SCORE, _DONE)
        for reason in (_DONE, "cancelled"):
            self.successes.labels(_FINETUNE, reason)
        for state in _JOB_STATES:
            self.train_jobs.labels(state)
        for state in ADAPTER_STATES:
            self.adapters.labels(state)
        for reason in ("disconnect", "stalled", "api", "timeout"):
            self.cancelled.labels(reason)
        for streaming in ("true", "false"):
            self.first_token.labels(streaming)
        for phase in ("warmup", "serving"):
            self.compilations.labels(phase)
        for work in ("prefill", "decode", "score", "train"):
            for use in ("request", "padding"):
                self.computed_tokens.labels(work, use)

    def count_http(self, scope: Scope, status: int) -> None:
        """Counts one answer; what a client chose freely is counted as ``other``."""
        path, method = scope["path"], scope["method"]
        self.http_requests.labels(
            _route(path),
            method if method in _METHODS else _OTHER,
            str(status),
        ).inc()


def _route(path: str) -> str:
    """What is below a resource is counted as the resource."""
    for resource in ("/finetune", "/adapters"):
        if path.startswith(resource + "/"):
            return resource
    return path if path in _ROUTES else _OTHER


class CountRequests:
    """Pure ASGI: counts every answer, refusals of the edge included."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.count_http(scope, message["status"])
            await send(message)

        await self.app(scope, receive, counting)


class GenerationMeter:
    """Measures one request to ``/generate`` from its arrival to its end."""

    def __init__(self, metrics: Metrics, *, streaming: bool) -> None:
        self._metrics = metrics
        self._adapter = _BASE
        self._streaming = "true" if streaming else "false"
        self._arrived_at = time.monotonic()
        self._last_token_at: dict[int, float] = {}
        # Looked up once, and not for every token.
        self._generation_tokens = metrics.generation_tokens.labels(self._adapter)

    def admitted(self, num_prompt_tokens: int, *, has_adapter: bool = False) -> None:
        if has_adapter:
            self._adapter = _ADAPTER
            self._generation_tokens = self._metrics.generation_tokens.labels(_ADAPTER)
        self._metrics.prompt_tokens.labels(_GENERATE, self._adapter).inc(num_prompt_tokens)

    def tokens(self, output: int, count: int) -> None:
        """``count`` new tokens of one output arrived."""
        now = time.monotonic()
        if not self._last_token_at:
            self._metrics.first_token.labels(self._streaming).observe(now - self._arrived_at)
        if (last := self._last_token_at.get(output)) is not None:
            for _ in range(count):
                self._metrics.inter_token.observe((now - last) / count)
        self._last_token_at[output] = now
        self._generation_tokens.inc(count)

    def finished(
        self, finish_reasons: list[str], queue_seconds: float, num_cached_tokens: int
    ) -> None:
        elapsed = time.monotonic() - self._arrived_at
        self._metrics.e2e.labels(_GENERATE).observe(elapsed)
        self._metrics.queue_time.labels(_GENERATE).observe(queue_seconds)
        self._metrics.cached_tokens.labels(self._adapter).inc(num_cached_tokens)
        for reason in finish_reasons:
            self._metrics.successes.labels(_GENERATE, reason).inc()
        if "timeout" in finish_reasons:
            self._metrics.cancelled.labels("timeout").inc()
        if "cancelled" in finish_reasons:
            self._metrics.cancelled.labels("api").inc()

    def failed(self, code: str) -> None:
        self._metrics.failures.labels(_GENERATE, code).inc()

    def abandoned(self, reason: Literal["disconnect", "stalled"] = "disconnect") -> None:
        """Nobody reads the answer any more."""
        self._metrics.cancelled.labels(reason).inc()


class ScoreMeter:
    """Measures one request to ``/score`` from its arrival to its end."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrived_at = time.monotonic()

    def finished(
        self, num_prompt_tokens: int, queue_seconds: float, *, has_adapter: bool = False
    ) -> None:
        elapsed = time.monotonic() - self._arrived_at
        adapter = _ADAPTER if has_adapter else _BASE
        self._metrics.prompt_tokens.labels(_SCORE, adapter).inc(num_prompt_tokens)
        self._metrics.e2e.labels(_SCORE).observe(elapsed)
        self._metrics.queue_time.labels(_SCORE).observe(queue_seconds)
        self._metrics.successes.labels(_SCORE, _DONE).inc()

    def failed(self, code: str) -> None:
        self._metrics.failures.labels(_SCORE, code).inc()
        if code == DeadlineExceeded.code:
            self._metrics.cancelled.labels("timeout").inc()
        if code == RequestCancelled.code:
            self._metrics.cancelled.labels("api").inc()

    def abandoned(self) -> None:
        """Nobody reads the answer any more."""
        self._metrics.cancelled.labels("disconnect").inc()


class TrainingMeter:
    """Measures jobs."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def statuses(self, statuses: Sequence[str], num_elsewhere: int) -> None:
        """Of all jobs that have not ended; some are paused as another model is served."""
        for state in _JOB_STATES:
            self._metrics.train_jobs.labels(state).set(statuses.count(state))
        self._metrics.storage_paused_jobs.set(statuses.count("paused") - num_elsewhere)
        self._metrics.requests_running.labels(_FINETUNE).set(statuses.count("running"))
        self._metrics.requests_waiting.labels(_FINETUNE).set(statuses.count("queued"))

    def step(self, num_rows: int, num_tokens: int, tokens_per_second: float) -> None:
        """A job has made one."""
        self._metrics.train_rows.observe(num_rows)
        self._metrics.train_steps.inc()
        self._metrics.train_tokens.inc(num_tokens)
        if tokens_per_second > 0:
            self._metrics.train_step.observe(num_tokens / tokens_per_second)

    def published(self, seconds: float) -> None:
        """A version has a name, so many seconds after the worker told of it."""
        self._metrics.adapter_publish.observe(seconds)

    def refused(self, code: str) -> None:
        """A job was never taken."""
        self._metrics.failures.labels(_FINETUNE, code).inc()

    def ended(self, status: str, code: str | None, seconds: float) -> None:
        """A job has, so many seconds after it came."""
        if status == "failed":
            self._metrics.failures.labels(_FINETUNE, code or _OTHER).inc()
            return
        self._metrics.successes.labels(
            _FINETUNE, _DONE if status == "succeeded" else "cancelled"
        ).inc()
        self._metrics.e2e.labels(_FINETUNE).observe(seconds)
