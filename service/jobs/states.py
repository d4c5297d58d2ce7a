"""The only state changes of a job.

::

    queued --> running --> succeeded | failed | cancelled
       |        |  ^
       |        v  |
       |       paused --> succeeded | failed | cancelled
       +--> cancelled | failed

A job that has ended stays as it is.
"""

from service.jobs.records import JobRecord, JobStatus

LEGAL: dict[JobStatus, frozenset[JobStatus]] = {
    "queued": frozenset({"running", "failed", "cancelled"}),
    "running": frozenset({"paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"running", "succeeded", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}


class IllegalChange(Exception):
    """A bug: a job cannot go from one status to that other one."""


def check_change(record: JobRecord, status: JobStatus) -> None:
    """Raises `IllegalChange` unless the job may have ``status`` next."""
    if status not in LEGAL[record.status]:
        raise IllegalChange(f"{record.id} is {record.status} and cannot be {status}")
