"""The only changes of adapters and versions, each inside of one transaction.

They say what has changed, so that names and files can follow once it lasts.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from service.adapters import AdapterVersion
from service.errors import AdapterBusy, AdapterNotFound, VersionConflict
from service.jobs import tables
from service.jobs.job_changes import is_good_enough
from service.jobs.records import AdapterRecord, JobRecord, VersionRecord
from service.protocol.training import JobVersion

# Of a job's versions that are neither live nor its last.
KEPT_BETWEEN = 4


@dataclass(frozen=True, slots=True)
class Changes:
    """What has changed.

    Attributes:
        adapters: As they are now.
        versions: As they are now; one that was deleted is gone.
        released: Digests that no version has any more.
    """

    adapters: list[AdapterRecord] = field(default_factory=list)
    versions: list[VersionRecord] = field(default_factory=list)
    released: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Published:
    """A version that a job has made.

    Attributes:
        version: It.
        is_live: Whether it is live now.
        is_news: Whether it was not told before.
        changes: Of this and other versions.
    """

    version: VersionRecord
    is_live: bool
    is_news: bool
    changes: Changes


def publish(db: sqlite3.Connection, job: JobRecord, told: JobVersion, created: float) -> Published:
    """What a job has made gets its number, and becomes live if it may."""
    adapter = tables.adapter(db, job.adapter)
    known = [
        version
        for version in tables.versions_of_digest(db, told.digest)
        if version.job == job.id and version.step == told.step
    ]
    if known:
        version = known[0]
        if version.place == "gone":
            version = replace(version, place="memory", path=None)
        if adapter.lost_live == version.number:
            adapter = replace(adapter, live=version.number, lost_live=None)
    else:
        version = _new_version(job, told, adapter.next_number, created)
        adapter = replace(adapter, next_number=version.number + 1)
        if is_good_enough(job, told.step):
            adapter = replace(adapter, live=version.number, lost_live=None)
    tables.put_version(db, version)
    changes = _moved(db, adapter, [version])
    _let_go_of_old(db, job, adapter, changes)
    return Published(version, adapter.live == version.number, not known, changes)


def promote(db: sqlite3.Connection, job: JobRecord) -> Published | None:
    """The job's newest version, if a measurement that came after it makes it live."""
    if job.version is None:
        return None
    version = tables.find_version(db, job.adapter, job.version)
    adapter = tables.adapter(db, job.adapter)
    if version is None or version.job != job.id or version.step != job.eval_step:
        return None
    version = replace(version, valid_loss=job.valid_loss)
    tables.put_version(db, version)
    is_moved = is_good_enough(job, job.eval_step) and version.place != "gone"
    if not is_moved or (adapter.live or 0) >= version.number:
        return None
    adapter = replace(adapter, live=version.number, lost_live=None)
    return Published(version, True, True, _moved(db, adapter, [version]))


def add(db: sqlite3.Connection, version: VersionRecord) -> tuple[VersionRecord, Changes]:
    """A version that came as a file gets its number and becomes live."""
    adapter = tables.adapter(db, version.adapter)
    version = replace(version, number=adapter.next_number)
    number = version.number
    adapter = replace(
        adapter, next_number=number + 1, live=number, lasting_live=number, lost_live=None
    )
    tables.put_version(db, version)
    return version, _moved(db, adapter, [version])


def saved(db: sqlite3.Connection, adapter_name: str, number: int, path: str) -> Changes:
    """A version lies on disk now. One that was let go of meanwhile stays gone."""
    version = tables.find_version(db, adapter_name, number)
    adapter = tables.adapter(db, adapter_name)
    if version is None or version.place == "gone":
        return Changes()
    version = replace(version, place="disk", path=path)
    tables.put_version(db, version)
    if adapter.live == number:
        adapter = replace(adapter, lasting_live=number)
    return _moved(db, adapter, [version])


def move_live(
    db: sqlite3.Connection, name: str, live: int, expected: Sequence[int | None]
) -> Changes:
    """Moves ``live``, if it is now what ``expected`` holds; nothing in it: wherever it is.

    Raises:
        AdapterNotFound: There is no such version, or it is gone.
        VersionConflict: Another one is live.
    """
    adapter = tables.adapter(db, name)
    if tables.version(db, name, live).place != "disk":
        raise AdapterNotFound("That version is gone.")
    if expected and adapter.live != expected[0]:
        now = "none" if adapter.live is None else f"version {adapter.live}"
        raise VersionConflict(f"What is live is {now}; read the adapter and decide again.")
    return _moved(db, replace(adapter, live=live, lasting_live=live, lost_live=None), [])


def delete(db: sqlite3.Connection, name: str, numbers: Iterable[int] | None) -> Changes:
    """Removes versions; None: the adapter with all that it has.

    Raises:
        AdapterNotFound: There is no such adapter or version.
        AdapterBusy: A job makes versions of it, or goes on from one of them.
    """
    if numbers is None:
        doomed = tables.all_versions(db, name)
    else:
        doomed = [tables.version(db, name, number) for number in numbers]
    if not doomed:
        raise AdapterNotFound("There is no such adapter, or it has no such version.")
    names = {version.name for version in doomed}
    for job in tables.open_jobs(db):
        if job.init in names or (numbers is None and job.adapter == name):
            raise AdapterBusy("A job still needs it; cancel the job or wait until it has ended.")
    gone = [replace(version, place="gone") for version in doomed]
    for version in gone:
        tables.remove_version(db, version)
    changes = _moved(db, _settled(db, tables.adapter(db, name)), gone)
    _note_released(db, [version.digest for version in gone], changes)
    return changes


def lose_memory(db: sqlite3.Connection) -> Changes:
    """The worker has died, and with it whatever was in its memory alone."""
    lost = [
        replace(version, place="gone")
        for version in tables.present_versions(db)
        if version.place == "memory"
    ]
    return _gone(db, lost)


def open_files(
    db: sqlite3.Connection, given: Iterable[AdapterVersion], folder: Path, now: float
) -> Changes:
    """Compares the table with what is on disk at the start.

    A version whose file is missing is gone. A file that the command line names is the version that
    it was at the start before, if its bytes are the same, or else the next one of its name, which
    becomes live.
    """
    files = {(version.name, version.digest): version for version in given}
    lost = []
    for version in tables.present_versions(db):
        if version.origin == "file":
            is_there = (version.adapter, version.digest) in files
        else:
            is_there = version.path is not None and (folder / version.path).is_file()
        if not is_there:
            lost.append(replace(version, place="gone"))
    changes = _gone(db, lost)
    for version in tables.file_versions(db):
        file = files.pop((version.adapter, version.digest), None)
        if file is not None:
            back = replace(version, place="disk", path=str(file.path))
            tables.put_version(db, back)
            adapter = tables.adapter(db, back.adapter)
            if adapter.live is None or adapter.lost_live == back.number:
                number = back.number
                adapter = replace(adapter, live=number, lasting_live=number, lost_live=None)
            _extend(changes, _moved(db, adapter, [back]))
    for file in files.values():
        assert file.path is not None, "the command line names files"
        version = VersionRecord(
            adapter=file.name,
            number=0,
            digest=file.digest,
            origin="file",
            place="disk",
            created=now,
            num_bytes=file.path.stat().st_size,
            preset_digest=None,
            path=str(file.path),
        )
        _extend(changes, add(db, version)[1])
    return changes


def _new_version(job: JobRecord, told: JobVersion, number: int, created: float) -> VersionRecord:
    parent = job.version
    if parent is None and job.init is not None and job.init.partition("@")[0] == job.adapter:
        parent = int(job.init.partition("@")[2])
    return VersionRecord(
        adapter=job.adapter,
        number=number,
        digest=told.digest,
        origin="job",
        place="memory",
        created=created,
        num_bytes=told.num_bytes,
        preset_digest=job.preset_digest,
        form=job.hyperparameters.form,
        job=job.id,
        step=told.step,
        is_last=told.is_last,
        parent=parent,
        init=job.init,
        loss=job.loss if job.step == told.step else None,
        valid_loss=job.valid_loss if job.eval_step == told.step else None,
        data_digest=job.data_digest,
        hyperparameters=job.hyperparameters,
    )


def _let_go_of_old(
    db: sqlite3.Connection, job: JobRecord, adapter: AdapterRecord, changes: Changes
) -> None:
    """Keeps the job's last few versions, beside those that somebody needs."""
    needed = {each.init for each in tables.open_jobs(db)}
    between = [
        version
        for version in tables.present_of_adapter(db, adapter.name)
        if version.job == job.id
        and not version.is_last
        and version.number not in (adapter.live, adapter.lasting_live)
        and version.name not in needed
    ]
    gone = [replace(version, place="gone", path=None) for version in between[:-KEPT_BETWEEN]]
    for version in gone:
        tables.put_version(db, version)
    changes.versions.extend(gone)
    _note_released(db, [version.digest for version in gone], changes)


def _gone(db: sqlite3.Connection, lost: Sequence[VersionRecord]) -> Changes:
    changes = Changes()
    for version in lost:
        tables.put_version(db, version)
    changes.versions.extend(lost)
    for name in sorted({version.adapter for version in lost}):
        _extend(changes, _moved(db, _settled(db, tables.adapter(db, name)), []))
    return changes


def _settled(db: sqlite3.Connection, adapter: AdapterRecord) -> AdapterRecord:
    """If the live version is gone, the one before it that is on disk is live again."""

    def is_there(number: int | None) -> bool:
        version = None if number is None else tables.find_version(db, adapter.name, number)
        return version is not None and version.place != "gone"

    lasting = adapter.lasting_live if is_there(adapter.lasting_live) else None
    if is_there(adapter.live):
        return replace(adapter, lasting_live=lasting)
    lost = adapter.live if adapter.live is not None else adapter.lost_live
    return replace(adapter, live=lasting, lasting_live=lasting, lost_live=lost)


def _moved(
    db: sqlite3.Connection, adapter: AdapterRecord, versions: Sequence[VersionRecord]
) -> Changes:
    tables.put_adapter(db, adapter)
    return Changes([adapter], list(versions))


def _note_released(db: sqlite3.Connection, digests: Iterable[str], changes: Changes) -> None:
    for digest in digests:
        if not tables.is_held(db, digest):
            changes.released.append(digest)


def _extend(changes: Changes, others: Changes) -> None:
    changes.adapters.extend(others.adapters)
    changes.versions.extend(others.versions)
    changes.released.extend(others.released)
