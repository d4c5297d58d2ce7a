"""Jobs, versions and keys of one service, put together over one data folder."""

from collections.abc import Callable
from dataclasses import dataclass

from service.adapters import AdapterNames
from service.jobs.folders import Folders
from service.jobs.idempotency import IdempotencyKeys
from service.jobs.jobs import JobLimits, Jobs
from service.jobs.store import Store
from service.jobs.versions import Versions
from service.jobs.worker_calls import WorkerCalls
from service.observability import Metrics, TrainingMeter
from service.protocol.training import TrainingCommand
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class DataFiles:
    """What is open in the data folder."""

    store: Store
    folders: Folders


@dataclass(frozen=True, slots=True)
class Training:
    """What routes use of it."""

    jobs: Jobs
    versions: Versions
    keys: IdempotencyKeys
    meter: TrainingMeter


def open_training(
    files: DataFiles,
    settings: Settings,
    names: AdapterNames,
    metrics: Metrics,
    send: Callable[[TrainingCommand], None],
    in_use: Callable[[str], bool],
) -> Training:
    """Reads the tables; names follow them from now on.

    Args:
        files: Of the data folder.
        settings: Of the service.
        names: That requests may use.
        metrics: Of the service.
        send: Takes one command for the worker.
        in_use: Whether a request in flight carries a digest.
    """
    calls = WorkerCalls(send)
    meter = TrainingMeter(metrics)
    is_served = settings.adapter_slots > 0
    versions = Versions(files.store, files.folders, names, calls, in_use, is_served=is_served)
    limits = JobLimits(settings.running_jobs, settings.queued_jobs, settings.job_steps)
    jobs = Jobs(files.store, files.folders, versions, calls, limits, meter)
    jobs.open()
    return Training(jobs, versions, IdempotencyKeys(files.store), meter)
