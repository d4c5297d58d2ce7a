"""SQLite, on a thread of its own that nobody else's query can hold up.

Whoever changes something hands over a function that runs in one transaction: all of it lasts when
`write` returns, or none of it ever happened. Reads see what was committed.
"""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from service.errors import StorageFull

SCHEMA_VERSION = 1
FILE_NAME = "service.sqlite"
_BUSY_SECONDS = 5.0
# What a disk does that is full or broken.
_STORAGE_ERRORS = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")

_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    status TEXT NOT NULL,
    record BLOB NOT NULL,
    command BLOB
);
CREATE INDEX jobs_by_status ON jobs (status);
CREATE TABLE events (
    job TEXT NOT NULL,
    number INTEGER NOT NULL,
    kind TEXT NOT NULL,
    data BLOB NOT NULL,
    created REAL NOT NULL,
    PRIMARY KEY (job, number)
) WITHOUT ROWID;
CREATE TABLE adapters (name TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE versions (
    adapter TEXT NOT NULL,
    number INTEGER NOT NULL,
    digest TEXT NOT NULL,
    place TEXT NOT NULL,
    record BLOB NOT NULL,
    PRIMARY KEY (adapter, number)
) WITHOUT ROWID;
CREATE INDEX versions_by_digest ON versions (digest);
CREATE INDEX versions_by_place ON versions (place);
CREATE TABLE answered (
    tenant TEXT NOT NULL,
    key TEXT NOT NULL,
    request TEXT NOT NULL,
    answer TEXT NOT NULL,
    created REAL NOT NULL,
    PRIMARY KEY (tenant, key)
) WITHOUT ROWID;
"""

T = TypeVar("T")


class StoreUnusable(Exception):
    """The database cannot be used; the message is one line for the operator."""


class Store:
    """The database of one data folder.

    Args:
        path: Of the file; made if it is not there.

    Raises:
        StoreUnusable: It is damaged, or of a newer version of the service.
    """

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1, "store")
        try:
            self._connection = self._thread.submit(_open, path).result()
        except BaseException:
            self._thread.shutdown()
            raise

    async def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Runs ``change`` in one transaction and makes it last.

        Raises:
            StorageFull: There is no room; nothing has changed.
        """
        return await asyncio.wrap_future(self._thread.submit(self._write, change))

    def write_now(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """The same where no event loop runs: at the start."""
        return self._thread.submit(self._write, change).result()

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """What ``query`` finds."""
        return await asyncio.wrap_future(self._thread.submit(query, self._connection))

    def close(self) -> None:
        """After what was asked for before."""
        self._thread.submit(self._connection.close)
        self._thread.shutdown()

    def _write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = change(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(_STORAGE_ERRORS):
                raise StorageFull(
                    "There is no room for the record of this in GEMMA_DATA_DIR."
                ) from error
            raise
        return result


def _open(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    except sqlite3.Error as error:
        raise StoreUnusable(f"cannot open {path}: {error}. Set GEMMA_DATA_DIR.") from error
    try:
        _prepare(connection, path)
    except sqlite3.Error as error:
        connection.close()
        raise StoreUnusable(
            f"{path} cannot be read: {error}. Restore it, or move it away to begin anew."
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise StoreUnusable(
            f"{path} is of a newer version of the service (schema {version}, this one knows "
            f"{SCHEMA_VERSION}). Update the service, or set GEMMA_DATA_DIR to another folder."
        )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    [finding] = connection.execute("PRAGMA quick_check(1)").fetchone()
    if finding != "ok":
        raise sqlite3.DatabaseError("its pages are damaged")
    if version == 0:
        connection.executescript(
            f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
