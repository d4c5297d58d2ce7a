"""Records of jobs and versions as what a client reads."""

import json
import time
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from service.adapters import AdapterNames
from service.api.adapter_schemas import Version, VersionMetrics
from service.api.finetune_schemas import (
    DryRun,
    Job,
    JobError,
    JobEvent,
    JobMetrics,
    PromoteRule,
    PublishEvery,
    ResolvedHyperparameters,
    RowTokens,
)
from service.jobs.records import JobRecord, StoredEvent, VersionRecord
from service.protocol.training import Hyperparameters, JobPrepared


def job_of(record: JobRecord, base: str, names: AdapterNames) -> Job:
    """A job, under the name of the base."""
    live = names.live(record.adapter)
    error = None
    if record.error_code is not None:
        error = JobError(code=record.error_code, detail=record.error_detail)
    return Job(
        id=record.id,
        adapter=record.adapter,
        status=record.status,
        base=base,
        init=base if record.init is None else f"{base}:{record.init}",
        step=record.step,
        total_steps=record.num_steps,
        version=record.version,
        live=live is not None and live == record.version,
        metrics=JobMetrics(
            loss=record.loss, valid_loss=record.valid_loss, tokens=record.num_tokens
        ),
        created=_when(record.created),
        started=None if record.started is None else _when(record.started),
        finished=None if record.finished is None else _when(record.finished),
        estimated_finish=_estimated_finish(record),
        hyperparameters=hyperparameters_of(record.hyperparameters),
        publish=_publish(record),
        promote=_promote(record),
        rows=record.num_rows,
        validation=record.num_validation_rows,
        metadata=record.metadata,
        data_digest=record.data_digest,
        error=error,
    )


def hyperparameters_of(told: Hyperparameters) -> ResolvedHyperparameters:
    """Everything, the form of the adapter included."""
    fields: dict[str, Any] = msgspec.structs.asdict(told)
    form = msgspec.structs.asdict(fields.pop("form"))
    return ResolvedHyperparameters(**fields, **{**form, "targets": list(form["targets"])})


def version_of(record: VersionRecord, base: str) -> Version:
    """A version with its lineage."""
    form = record.form
    hyperparameters = record.hyperparameters
    return Version(
        version=record.number,
        digest=record.digest,
        origin=record.origin,
        job=record.job,
        step=record.step,
        parent=record.parent,
        init=None if record.init is None else f"{base}:{record.init}",
        layout=None if form is None else form.layout,
        rank=None if form is None else form.rank,
        alpha=None if form is None else form.alpha,
        targets=None if form is None else list(form.targets),
        metrics=VersionMetrics(loss=record.loss, valid_loss=record.valid_loss),
        hyperparameters=None if hyperparameters is None else hyperparameters_of(hyperparameters),
        data_digest=record.data_digest,
        preset_digest=record.preset_digest,
        bytes=record.num_bytes,
        created=_when(record.created),
        resident=record.place != "gone",
        durable=record.place == "disk",
    )


def dry_run_of(prepared: JobPrepared) -> DryRun:
    """What a job would take."""
    return DryRun(
        tokens=prepared.num_tokens,
        padded_tokens=prepared.num_padded_tokens,
        steps=prepared.num_steps,
        estimated_s=prepared.seconds,
        first_rows=[
            RowTokens(
                token_ids=list(row.token_ids),
                tokens=list(row.tokens),
                loss_mask=list(row.loss_mask),
            )
            for row in prepared.first_rows
        ],
    )


def event_of(event: StoredEvent) -> JobEvent:
    return JobEvent(
        id=event.number,
        event=event.kind,
        created=_when(event.created),
        data=json.loads(event.data),
    )


def _publish(record: JobRecord) -> Literal["end", "every_step", "never"] | PublishEvery:
    if not record.is_promoted:
        return "never"
    match record.publish:
        case None:
            return "end"
        case 1:
            return "every_step"
        case steps:
            return PublishEvery(every=steps)


def _promote(record: JobRecord) -> PromoteRule | None:
    if record.promotion is None:
        return None
    bound = record.promotion.less_than
    return PromoteRule(metric="valid_loss", less_than="init" if bound is None else bound)


def _estimated_finish(record: JobRecord) -> datetime | None:
    """From how long the steps have taken; before the first one, from what was expected."""
    if record.has_ended or record.started is None:
        return None
    if record.updated is None or record.step == 0:
        return _when(max(record.started + record.seconds, time.time()))
    per_step = (record.updated - record.started) / record.step
    left = per_step * (record.num_steps - record.step)
    return _when(max(record.updated + left, time.time()))


def _when(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
