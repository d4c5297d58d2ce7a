"""What an event of the worker changes in the record of a job: plain functions of both.

Steps and measurements may be told again after a restart; what was told before changes nothing.
"""

from typing import Any, NamedTuple

from msgspec.structs import replace

from service.jobs.records import EventKind, JobRecord, JobStatus
from service.jobs.states import check_change
from service.protocol.training import JobEval, JobStep


class NewEvent(NamedTuple):
    """For those who follow the job."""

    kind: EventKind
    data: dict[str, Any]


Changed = tuple[JobRecord, list[NewEvent]]


def with_status(
    record: JobRecord,
    status: JobStatus,
    now: float,
    *,
    code: str | None = None,
    detail: str | None = None,
) -> Changed:
    """The job in its next status; nothing changes if that is the one it has.

    Raises:
        IllegalChange: It cannot have that one.
    """
    if record.status == status:
        return record, []
    check_change(record, status)
    changed = replace(record, status=status)
    if status == "running" and record.started is None:
        changed = replace(changed, started=now)
    if not changed.has_ended:
        data: dict[str, Any] = {"status": status}
        return changed, [NewEvent("status", data if detail is None else {**data, "detail": detail})]
    changed = replace(changed, finished=now, error_code=code, error_detail=detail)
    data = {"status": status, "step": changed.step, "version": changed.version}
    if status != "failed":
        return changed, [NewEvent("done", data)]
    return changed, [NewEvent("error", {**data, "code": code, "detail": detail})]


def with_step(record: JobRecord, told: JobStep, now: float) -> Changed:
    """The job after a step, of which it may have been told before."""
    if record.has_ended:
        return record, []
    record, events = with_status(record, "running", now)
    if told.step <= record.step:
        return record, events
    changed = replace(
        record,
        step=told.step,
        loss=told.loss,
        num_tokens=record.num_tokens + told.num_tokens,
        updated=now,
    )
    data = {
        "step": told.step,
        "loss": told.loss,
        "learning_rate": told.learning_rate,
        "grad_norm": told.grad_norm,
        "tokens": told.num_tokens,
        "tokens_per_s": told.tokens_per_second,
        "rows_shared": told.rows_shared,
    }
    return changed, [*events, NewEvent("step", data)]


def with_eval(record: JobRecord, told: JobEval) -> Changed:
    """The job after a measurement, of which it may have been told before."""
    if record.has_ended or told.step <= record.eval_step:
        return record, []
    changed = replace(record, eval_step=told.step, valid_loss=told.valid_loss)
    if told.step == 0:
        changed = replace(changed, initial_valid_loss=told.valid_loss)
    return changed, [NewEvent("eval", {"step": told.step, "valid_loss": told.valid_loss})]


def is_good_enough(record: JobRecord, step: int) -> bool:
    """Whether what the job made at ``step`` may become live, as far as is known."""
    if not record.is_promoted or record.promotion is None:
        return record.is_promoted
    bound = record.promotion.less_than
    if bound is None:
        bound = record.initial_valid_loss
    if record.eval_step != step or bound is None or record.valid_loss is None:
        return False
    return record.valid_loss < bound
