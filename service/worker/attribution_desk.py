"""Attributions on an engine, a part at a time.

They wait as texts that are scored do (`service.worker.waiting`). Two of them take turns, a pass
through the model at a time, so that a short one need not wait for all of a long one.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

from model.attribution_questions import Attribution, AttributionEngine, num_padding_tokens
from service.worker.admission import Admission
from service.worker.attribution_jobs import AttributionJob
from service.worker.waiting import WaitingLine
from service.worker.work_done import WorkDone

_MAX_RUNNING = 2


class _Running(NamedTuple):
    job: AttributionJob
    parts: Generator[bool, None, Attribution]


class AttributionDesk:
    """All attributions of one worker.

    Args:
        engine: Does the work.
        admission: Told when a job leaves the queue.
        work: Counts tokens.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        engine: AttributionEngine,
        admission: Admission,
        work: WorkDone,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._work = work
        self._clock = clock
        self._waiting: WaitingLine[AttributionJob] = WaitingLine()
        self._running: deque[_Running] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def submit(self, jobs: Iterable[AttributionJob]) -> None:
        """Lets jobs wait for their turn."""
        self._waiting.add(jobs)

    def step(self, until: float) -> AttributionJob | None:
        """Parts of one job up to about ``until`` (monotonic seconds); the job, if it is done.

        Stops at the end of a pass, and before a part that would last beyond ``until`` if it takes
        as long as the longest of those before it.
        """
        while self._waiting and len(self._running) < _MAX_RUNNING:
            self._begin(self._waiting.pop())
        longest, began = 0.0, self._clock()
        job, parts = self._running[0]
        while True:
            try:
                is_end_of_pass = next(parts)
            except StopIteration as done:
                job.answer = done.value
                self._running.popleft()
                question = job.question
                self._work.note_attribution(question.cost_tokens, num_padding_tokens(question))
                return job
            now = self._clock()
            longest = max(longest, now - began)
            began = now
            if is_end_of_pass:
                self._running.rotate(-1)
            if is_end_of_pass or now + longest > until:
                return None

    def remove(self, job: AttributionJob) -> None:
        """Its answer is not wanted any more, wherever it stood. May be called twice."""
        self._waiting.remove(job)
        self._running = deque(each for each in self._running if each.job is not job)

    def _begin(self, job: AttributionJob) -> None:
        self._admission.started(job.key)
        self._running.append(_Running(job, self._engine.attribute(job.question)))
