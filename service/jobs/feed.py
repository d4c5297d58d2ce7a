"""Wakes those who follow a job once something of it has been committed."""

import asyncio
from weakref import WeakValueDictionary


class Feed:
    """Ask for `change` first and look at the tables then: what comes between is not missed."""

    def __init__(self) -> None:
        self._changes: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()

    def change(self, job_id: str) -> asyncio.Event:
        """Set at the next change of the job."""
        change = self._changes.get(job_id)
        if change is None:
            change = self._changes[job_id] = asyncio.Event()
        return change

    def tell(self, job_id: str) -> None:
        """Something has changed."""
        if (change := self._changes.pop(job_id, None)) is not None:
            change.set()
