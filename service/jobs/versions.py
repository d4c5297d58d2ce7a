"""The versions of adapters: names, files and the worker kept in step with the tables.

A change is committed first, then the names follow, then files go. A version that a job has just
made is in the worker's memory and can be asked for; what is live, and what a job ends with, is
saved behind it. Nothing is taken away from a request that runs: it carries a digest, and a file
stays for as long as any such request is in flight.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from service.adapters import AdapterNames, AdapterVersion
from service.errors import AdapterNotFound, ServiceError, StorageFull
from service.jobs import tables, version_changes
from service.jobs.folders import Folders
from service.jobs.idempotency import Once
from service.jobs.locks import Locks
from service.jobs.records import AdapterRecord, VersionRecord
from service.jobs.store import Store
from service.jobs.version_changes import Changes
from service.jobs.worker_calls import WorkerCalls
from service.protocol.messages import AdapterSource
from service.protocol.training import AddAdapter, ForgetAdapter, Layout

log = logging.getLogger(__name__)

_CLEAN_SECONDS = 0.2
# Between two attempts to save what found no room.
RETRY_SECONDS = 5.0


class Versions:
    """All versions of one service.

    Args:
        store: Has the tables.
        folders: Of the data folder.
        names: That requests may use; follow the tables.
        calls: To the worker.
        in_use: Whether a request in flight carries a digest.
        is_served: Whether there is room for adapters at all.
    """

    def __init__(
        self,
        store: Store,
        folders: Folders,
        names: AdapterNames,
        calls: WorkerCalls,
        in_use: Callable[[str], bool],
        *,
        is_served: bool,
    ) -> None:
        self._store = store
        self._folders = folders
        self._names = names
        self._calls = calls
        self._in_use = in_use
        self._is_served = is_served
        self._locks = Locks()
        self._doomed: set[str] = set()
        self._cleaning: asyncio.Task[None] | None = None
        self._behind: set[asyncio.Task[bool]] = set()
        self._savers: dict[str, asyncio.Task[None]] = {}

    def open(self) -> None:
        """Compares tables and files; at the start, before there is an event loop."""
        given = self._names.versions
        self._store.write_now(
            lambda db: version_changes.open_files(db, given, self._folders.path, time.time())
        )
        # What was in the memory of the worker of a process that was killed.
        self._store.write_now(version_changes.lose_memory)
        present = self._store.write_now(tables.present_versions)
        adapters = self._store.write_now(tables.adapters)
        for version in given:
            self._names.remove(version.name, version.number)
        self.apply(Changes(adapters, present))

    @property
    def given(self) -> tuple[AdapterSource, ...]:
        """Files that the command line names, which a bad one ends the start of."""
        return tuple(
            AdapterSource(version.digest, str(version.path))
            for version in self._names.versions
            if version.preset_digest is None
        )

    def worker_ready(self, preset_digest: str) -> None:
        """Tells a new worker of every version on disk that belongs to its model."""
        self._names.preset_digest = preset_digest
        told = set()
        for version in self._names.versions:
            is_of_model = version.preset_digest == preset_digest
            if is_of_model and version.path is not None and version.digest not in told:
                told.add(version.digest)
                self._calls.send(AddAdapter(AdapterSource(version.digest, str(version.path))))

    def worker_lost(self) -> None:
        """What was in its memory alone has no name until it comes again."""
        for version in self._names.versions:
            if version.path is None:
                self._names.remove(version.name, version.number)

    async def forget_memory(self) -> None:
        """The tables follow `worker_lost`."""
        self.apply(await self._store.write(version_changes.lose_memory))

    def apply(self, changes: Changes) -> None:
        """Names, the worker and the files follow what was committed."""
        for version in changes.versions:
            if version.place == "gone" or not self._is_served:
                self._names.remove(version.adapter, version.number)
            else:
                self._names.put(self._named(version))
        for adapter in changes.adapters:
            self._names.set_live(adapter.name, adapter.live)
        for digest in changes.released:
            with contextlib.suppress(ServiceError):  # no worker, so it knows none
                self._calls.send(ForgetAdapter(digest))
            self._doomed.add(digest)
        if self._doomed and self._cleaning is None:
            self._cleaning = asyncio.create_task(self._clean())

    async def save(self, adapter: str, number: int) -> None:
        """Makes a version last; at once if it does already, or is gone.

        Raises:
            ServiceError: It could not be saved.
        """
        version = await self._store.read(lambda db: tables.find_version(db, adapter, number))
        if version is None or version.place != "memory":
            return
        digest = version.digest
        async with self._locks.of(digest):
            same = await self._store.read(lambda db: tables.versions_of_digest(db, digest))
            paths = [each.path for each in same if each.place == "disk" and each.origin != "file"]
            path = paths[0] if paths else None
            if path is None:
                told = await self._calls.save(digest, str(self._folders.adapter(digest)))
                path = str(Path(told.source.path).relative_to(self._folders.path))
            lasting = path
            self.apply(
                await self._store.write(
                    lambda db: version_changes.saved(db, adapter, number, lasting)
                )
            )

    def keep_saving(
        self, adapter: str, number: int, on_trouble: Callable[[ServiceError], None]
    ) -> "asyncio.Task[bool]":
        """Saves behind whoever calls; tries again while there is no room.

        The result is whether it lasts. It does not if the worker dies: then it comes again.
        """

        async def saving() -> bool:
            while True:
                try:
                    await self.save(adapter, number)
                except StorageFull as error:
                    on_trouble(error)
                    await asyncio.sleep(RETRY_SECONDS)
                except ServiceError as error:
                    if not error.retryable:
                        on_trouble(error)
                    return False
                else:
                    return True

        task = asyncio.create_task(saving())
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)
        return task

    def save_live(self, adapter: str) -> None:
        """Saves what is live, one after the other: of many in a row only some are."""
        if adapter in self._savers:
            return
        task = asyncio.create_task(self._saving_live(adapter))
        self._savers[adapter] = task
        task.add_done_callback(lambda _: self._savers.pop(adapter, None))

    async def _saving_live(self, adapter: str) -> None:
        saved = None
        while True:
            live = await self._store.read(lambda db: tables.adapter(db, adapter).live)
            if live is None or live == saved:
                return
            if not await self.keep_saving(adapter, live, _log_trouble):
                return
            saved = live

    async def adapters(self) -> list[tuple[AdapterRecord, int]]:
        """All that have a version, and the number of the newest one."""
        return await self._store.read(tables.adapters_with_versions)

    async def adapter(
        self, name: str, below: int, limit: int
    ) -> tuple[AdapterRecord, list[VersionRecord], bool]:
        """An adapter, its newest versions below a number, and whether there are more.

        Raises:
            AdapterNotFound: It has no versions.
        """

        def find(db: Any) -> tuple[AdapterRecord, list[VersionRecord], bool]:
            versions, has_more = tables.versions(db, name, below, limit)
            if not versions and not tables.all_versions(db, name):
                raise AdapterNotFound("There is no adapter of that name.")
            return tables.adapter(db, name), versions, has_more

        return await self._store.read(find)

    async def version(self, name: str, number: int) -> VersionRecord:
        """Raises `AdapterNotFound`."""
        return await self._store.read(lambda db: tables.version(db, name, number))

    async def present(self, name: str, number: int) -> VersionRecord:
        """A version that can be asked for.

        Raises:
            AdapterNotFound: There is no such version, or it is gone.
            AdapterMismatch: It is of another model.
        """
        if self._names.find(f"{name}@{number}") is None:
            raise AdapterNotFound("There is no such adapter, or it has no such version.")
        return await self.version(name, number)

    async def upload(self, name: str, content: bytes, layout: Layout, once: Once) -> VersionRecord:
        """A file that somebody sent becomes the live version of ``name``.

        Raises:
            ServiceError: It is no adapter for this model, or there is no room.
        """
        path = self._folders.passing_file()
        try:
            try:
                await asyncio.to_thread(path.write_bytes, content)
            except OSError as error:
                raise StorageFull("There is no room for the file in GEMMA_DATA_DIR.") from error
            told = await self._calls.import_file(str(path), layout)
        finally:
            path.unlink(missing_ok=True)
        async with self._locks.of(told.digest):
            folder = self._folders.adapter(told.digest)
            saved = await self._calls.save(told.digest, str(folder))
            version = VersionRecord(
                adapter=name,
                number=0,
                digest=told.digest,
                origin="upload",
                place="disk",
                created=time.time(),
                num_bytes=told.num_bytes,
                preset_digest=self._names.preset_digest,
                path=str(Path(saved.source.path).relative_to(self._folders.path)),
                form=told.form,
            )

            def change(db: Any) -> tuple[VersionRecord, Changes]:
                numbered, changes = version_changes.add(db, version)
                once.note(db, numbered.name)
                return numbered, changes

            numbered, changes = await self._store.write(change)
            self.apply(changes)
        return numbered

    async def download(self, name: str, number: int, layout: Layout) -> tuple[BinaryIO, int]:
        """An open file that has no name any more, and its size.

        Raises:
            AdapterNotFound: There is no such version, or it is gone.
        """
        version = self._names.find(f"{name}@{number}")
        if version is None:
            raise AdapterNotFound("There is no such adapter, or it has no such version.")
        path = self._folders.passing_file()
        try:
            told = await self._calls.export_file(version.digest, str(path), layout)
            return path.open("rb"), told.num_bytes
        finally:
            path.unlink(missing_ok=True)

    async def move_live(
        self, name: str, live: int, expected: Sequence[int | None]
    ) -> AdapterRecord:
        """Compare and swap; see `version_changes.move_live`. What becomes live lasts before."""
        await self.save(name, live)
        changes = await self._store.write(
            lambda db: version_changes.move_live(db, name, live, expected)
        )
        self.apply(changes)
        return changes.adapters[0]

    async def delete(self, name: str, number: int | None) -> None:
        """Removes one version, or the adapter with all that it has."""
        numbers = None if number is None else [number]
        self.apply(await self._store.write(lambda db: version_changes.delete(db, name, numbers)))

    async def settled(self) -> None:
        """Returns when what is being saved lasts."""
        while tasks := [*self._behind, *self._savers.values()]:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Ends what runs behind."""
        cleaning = [] if self._cleaning is None else [self._cleaning]
        tasks = [*self._behind, *self._savers.values(), *cleaning]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _named(self, version: VersionRecord) -> AdapterVersion:
        path = None if version.path is None else self._folders.path / version.path
        return AdapterVersion(
            version.adapter, version.number, version.digest, path, version.preset_digest
        )

    async def _clean(self) -> None:
        """Removes the files of versions that are gone once nobody uses them."""
        try:
            while self._doomed:
                for digest in sorted(self._doomed):
                    if not self._in_use(digest):
                        self._doomed.discard(digest)
                        await self._remove_files(digest)
                await asyncio.sleep(_CLEAN_SECONDS)
        finally:
            self._cleaning = None

    async def _remove_files(self, digest: str) -> None:
        async with self._locks.of(digest):
            if not await self._store.read(lambda db: tables.is_held(db, digest)):
                await asyncio.to_thread(self._folders.remove_adapter, digest)


def _log_trouble(error: ServiceError) -> None:
    log.error("a version cannot be saved: %s", error.detail)
