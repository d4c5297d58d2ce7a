"""A lock for each key, for as long as anybody holds it or waits for it."""

import asyncio
from collections.abc import Hashable
from weakref import WeakValueDictionary


class Locks:
    """``async with locks.of(key)``."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()

    def of(self, key: Hashable) -> asyncio.Lock:
        """The same one for everybody who has it in hand meanwhile."""
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock
