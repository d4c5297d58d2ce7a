"""The life of a job under any order of events: only legal changes, nothing told twice."""

import msgspec
import pytest
from hypothesis import given, strategies

from service.jobs.job_changes import with_eval, with_status, with_step
from service.jobs.records import JobRecord
from service.jobs.states import LEGAL, IllegalChange, check_change
from service.protocol.training import Form, Hyperparameters, JobEval, JobStep

HYPERPARAMETERS = Hyperparameters(
    Form("keras", 8, 8.0, ("query",)), None, 5, 2, 1e-3, "constant", 0, 0.0, None, 16, 0
)
RECORD = JobRecord(
    id="ft_1",
    tenant="default",
    adapter="tone",
    status="queued",
    init=None,
    init_digest=None,
    preset_digest="x",
    hyperparameters=HYPERPARAMETERS,
    num_rows=1,
    num_validation_rows=0,
    publish=None,
    is_promoted=True,
    promotion=None,
    metadata={},
    data_digest="x",
    num_steps=5,
    seconds=1.0,
    created=0.0,
)
STEPS = strategies.integers(1, 5).map(lambda n: JobStep("ft_1", n, 1.0, 1e-3, 1.0, 3, 9.0, 0, 2))
EVALS = strategies.integers(0, 5).map(lambda n: JobEval("ft_1", n, 2.0))
HAPPENINGS = strategies.lists(STEPS | EVALS | strategies.sampled_from(sorted(LEGAL)), max_size=30)


@given(HAPPENINGS)
def test_whatever_happens_a_job_ends_once_and_steps_are_told_once_and_in_order(happenings):
    record, told = RECORD, []
    for happening in happenings:
        before = record
        if isinstance(happening, JobStep):
            record, events = with_step(record, happening, 1.0)
        elif isinstance(happening, JobEval):
            record, events = with_eval(record, happening)
        elif happening == record.status or happening in LEGAL[record.status]:
            record, events = with_status(record, happening, 1.0)
        else:
            with pytest.raises(IllegalChange):
                check_change(record, happening)
            continue
        if before.has_ended:
            assert (record, events) == (before, [])
        told += events
    steps = [event.data["step"] for event in told if event.kind == "step"]
    assert steps == sorted(set(steps))
    ends = [number for number, event in enumerate(told) if event.kind in ("done", "error")]
    assert ends == ([len(told) - 1] if record.has_ended else [])
    assert record.num_tokens == 3 * len(steps)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=JobRecord) == record
