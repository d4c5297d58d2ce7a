"""Records in and out of the tables. Everything here runs on the store's thread."""

import sqlite3
from typing import Any

import msgspec

from service.errors import AdapterNotFound, JobNotFound
from service.jobs.records import (
    ENDED,
    AdapterRecord,
    EventKind,
    JobRecord,
    StoredEvent,
    VersionRecord,
)
from service.protocol.training import PrepareJob

_encode = msgspec.msgpack.Encoder().encode
_job = msgspec.msgpack.Decoder(JobRecord)
_adapter = msgspec.msgpack.Decoder(AdapterRecord)
_version = msgspec.msgpack.Decoder(VersionRecord)
_command = msgspec.msgpack.Decoder(PrepareJob)
_to_json = msgspec.json.Encoder().encode


# --- jobs -------------------------------------------------------------------------------------


def add_job(db: sqlite3.Connection, record: JobRecord, command: PrepareJob) -> None:
    db.execute(
        "INSERT INTO jobs (id, tenant, status, record, command) VALUES (?, ?, ?, ?, ?)",
        (record.id, record.tenant, record.status, _encode(record), _encode(command)),
    )


def job(db: sqlite3.Connection, job_id: str, tenant: str | None = None) -> JobRecord:
    """Raises `JobNotFound`, also for one of another tenant."""
    row = db.execute("SELECT record, tenant FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None or tenant not in (None, row[1]):
        raise JobNotFound("No job has that id.")
    return _job.decode(row[0])


def put_job(db: sqlite3.Connection, record: JobRecord) -> None:
    """What was sent is kept only until the job has ended."""
    db.execute(
        "UPDATE jobs SET status = ?, record = ? WHERE id = ?",
        (record.status, _encode(record), record.id),
    )
    if record.has_ended:
        db.execute("UPDATE jobs SET command = NULL WHERE id = ?", (record.id,))


def command(db: sqlite3.Connection, job_id: str) -> PrepareJob:
    """Of a job that has not ended."""
    [content] = db.execute("SELECT command FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return _command.decode(content)


def open_jobs(db: sqlite3.Connection) -> list[JobRecord]:
    """Those that have not ended, in the order in which they came."""
    marks = ", ".join("?" * len(ENDED))
    rows = db.execute(
        f"SELECT record FROM jobs WHERE status NOT IN ({marks}) ORDER BY number", sorted(ENDED)
    )
    return [_job.decode(record) for [record] in rows]


def jobs(
    db: sqlite3.Connection, tenant: str, after: str | None, limit: int
) -> tuple[list[JobRecord], bool]:
    """The newest first, those before ``after``; and whether there are more."""
    below = 2**62
    if after is not None:
        job(db, after, tenant)
        [below] = db.execute("SELECT number FROM jobs WHERE id = ?", (after,)).fetchone()
    rows = db.execute(
        "SELECT record FROM jobs WHERE tenant = ? AND number < ? ORDER BY number DESC LIMIT ?",
        (tenant, below, limit + 1),
    ).fetchall()
    return [_job.decode(record) for [record] in rows[:limit]], len(rows) > limit


# --- events -----------------------------------------------------------------------------------


def add_event(
    db: sqlite3.Connection, job_id: str, kind: EventKind, data: dict[str, Any], now: float
) -> None:
    """Behind the job's other events."""
    [last] = db.execute("SELECT max(number) FROM events WHERE job = ?", (job_id,)).fetchone()
    db.execute(
        "INSERT INTO events VALUES (?, ?, ?, ?, ?)",
        (job_id, (last or 0) + 1, kind, _to_json(data), now),
    )


def events(db: sqlite3.Connection, job_id: str, after: int, limit: int) -> list[StoredEvent]:
    """In order, from the one behind ``after``."""
    rows = db.execute(
        "SELECT number, kind, data, created FROM events WHERE job = ? AND number > ? "
        "ORDER BY number LIMIT ?",
        (job_id, after, limit),
    )
    return [StoredEvent(*row) for row in rows]


# --- adapters and versions --------------------------------------------------------------------


def adapters(db: sqlite3.Connection) -> list[AdapterRecord]:
    rows = db.execute("SELECT record FROM adapters ORDER BY name")
    return [_adapter.decode(record) for [record] in rows]


def adapters_with_versions(db: sqlite3.Connection) -> list[tuple[AdapterRecord, int]]:
    """Those that have any, with the number of the newest."""
    newest = dict(db.execute("SELECT adapter, max(number) FROM versions GROUP BY adapter"))
    return [(each, newest[each.name]) for each in adapters(db) if each.name in newest]


def adapter(db: sqlite3.Connection, name: str) -> AdapterRecord:
    """A new one if there is none."""
    row = db.execute("SELECT record FROM adapters WHERE name = ?", (name,)).fetchone()
    return AdapterRecord(name=name) if row is None else _adapter.decode(row[0])


def put_adapter(db: sqlite3.Connection, record: AdapterRecord) -> None:
    db.execute("INSERT OR REPLACE INTO adapters VALUES (?, ?)", (record.name, _encode(record)))


def versions(
    db: sqlite3.Connection, adapter_name: str, below: int, limit: int
) -> tuple[list[VersionRecord], bool]:
    """Of one adapter, the newest first, from below a number; and whether there are more."""
    rows = db.execute(
        "SELECT record FROM versions WHERE adapter = ? AND number < ? ORDER BY number DESC LIMIT ?",
        (adapter_name, below, limit + 1),
    ).fetchall()
    return [_version.decode(record) for [record] in rows[:limit]], len(rows) > limit


def all_versions(db: sqlite3.Connection, adapter_name: str) -> list[VersionRecord]:
    """Of one adapter, in order."""
    rows = db.execute(
        "SELECT record FROM versions WHERE adapter = ? ORDER BY number", (adapter_name,)
    )
    return [_version.decode(record) for [record] in rows]


def present_versions(db: sqlite3.Connection) -> list[VersionRecord]:
    """Those of all adapters that are not gone."""
    rows = db.execute(
        "SELECT record FROM versions WHERE place IN ('memory', 'disk') ORDER BY adapter, number"
    )
    return [_version.decode(record) for [record] in rows]


def versions_of_digest(db: sqlite3.Connection, digest: str) -> list[VersionRecord]:
    """Two jobs may make the same bytes."""
    rows = db.execute("SELECT record FROM versions WHERE digest = ?", (digest,))
    return [_version.decode(record) for [record] in rows]


def file_versions(db: sqlite3.Connection) -> list[VersionRecord]:
    """Those whose file the command line named, once or now."""
    rows = db.execute("SELECT record FROM versions ORDER BY adapter, number")
    found = [_version.decode(record) for [record] in rows]
    return [version for version in found if version.origin == "file"]


def present_of_adapter(db: sqlite3.Connection, adapter_name: str) -> list[VersionRecord]:
    """Those that are not gone, in order."""
    rows = db.execute(
        "SELECT record FROM versions WHERE adapter = ? AND place != 'gone' ORDER BY number",
        (adapter_name,),
    )
    return [_version.decode(record) for [record] in rows]


def find_version(db: sqlite3.Connection, adapter_name: str, number: int) -> VersionRecord | None:
    row = db.execute(
        "SELECT record FROM versions WHERE adapter = ? AND number = ?", (adapter_name, number)
    ).fetchone()
    return None if row is None else _version.decode(row[0])


def version(db: sqlite3.Connection, adapter_name: str, number: int) -> VersionRecord:
    """Raises `AdapterNotFound`."""
    found = find_version(db, adapter_name, number)
    if found is None:
        raise AdapterNotFound("There is no such adapter, or it has no such version.")
    return found


def put_version(db: sqlite3.Connection, record: VersionRecord) -> None:
    db.execute(
        "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?)",
        (record.adapter, record.number, record.digest, record.place, _encode(record)),
    )


def remove_version(db: sqlite3.Connection, record: VersionRecord) -> None:
    db.execute(
        "DELETE FROM versions WHERE adapter = ? AND number = ?", (record.adapter, record.number)
    )


def is_held(db: sqlite3.Connection, digest: str) -> bool:
    """Whether a version that is not gone has that digest."""
    row = db.execute(
        "SELECT 1 FROM versions WHERE digest = ? AND place != 'gone' LIMIT 1", (digest,)
    ).fetchone()
    return row is not None


# --- what was answered ------------------------------------------------------------------------


def answered(db: sqlite3.Connection, tenant: str, key: str) -> tuple[str, str] | None:
    """The digest of the request that came with an idempotency key, and its answer."""
    found: tuple[str, str] | None = db.execute(
        "SELECT request, answer FROM answered WHERE tenant = ? AND key = ?", (tenant, key)
    ).fetchone()
    return found


def put_answered(
    db: sqlite3.Connection, tenant: str, key: str, request: str, answer: str, now: float
) -> None:
    db.execute("INSERT INTO answered VALUES (?, ?, ?, ?, ?)", (tenant, key, request, answer, now))


def forget_answered(db: sqlite3.Connection, before: float) -> None:
    db.execute("DELETE FROM answered WHERE created < ?", (before,))
