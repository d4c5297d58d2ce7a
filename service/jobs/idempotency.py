"""Requests that may be sent again: the same key and body get the first one's answer.

What was answered is noted in the transaction that it is about, so that a key and its effect last
together or not at all.
"""

import hashlib
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from service.errors import IdempotencyMismatch
from service.jobs import tables
from service.jobs.locks import Locks
from service.jobs.store import Store

_KEPT_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Once:
    """One request that may have a key.

    Attributes:
        tenant: Whose it is.
        key: None: it has none, and is made each time.
        request: Digest of what was sent.
        answer: Of the first request with this key, if this is not it.
    """

    tenant: str
    key: str | None
    request: str
    answer: str | None = None

    def note(self, db: sqlite3.Connection, answer: str) -> None:
        """Keeps ``answer`` for whoever comes with the same key."""
        if self.key is not None:
            now = time.time()
            tables.put_answered(db, self.tenant, self.key, self.request, answer, now)


class IdempotencyKeys:
    """The keys that were used in the last seven days."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._locks = Locks()
        store.write_now(lambda db: tables.forget_answered(db, time.time() - _KEPT_SECONDS))

    @asynccontextmanager
    async def once(self, tenant: str, key: str | None, request: bytes) -> AsyncIterator[Once]:
        """Requests with one key come one after another.

        Raises:
            IdempotencyMismatch: The key came with another request before.
        """
        digest = hashlib.sha256(request).hexdigest()
        if key is None:
            yield Once(tenant, None, digest)
            return
        async with self._locks.of((tenant, key)):
            found = await self._store.read(lambda db: tables.answered(db, tenant, key))
            if found is not None and found[0] != digest:
                raise IdempotencyMismatch("Idempotency-Key came with another request before.")
            yield Once(tenant, key, digest, None if found is None else found[1])
