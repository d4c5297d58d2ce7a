"""Versions saved, imported and exported, by threads that call no model.

Saving is short and others wait for it, so it does not wait for imports, which take apart what
somebody sent, in a process of its own, for as long as that takes.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.errors import ModelError
from model.slots import Engine
from service.protocol.messages import AdapterSource
from service.protocol.training import (
    AdapterExported,
    AdapterFailed,
    AdapterImported,
    AdapterSaved,
    ExportAdapter,
    ImportAdapter,
    SaveAdapter,
    TrainingEvent,
)
from service.worker.adapter_store import ADAPTER_FILE, ADAPTER_GONE, AdapterStore
from service.worker.checkpoints import is_full
from service.worker.durable_files import write_record
from service.worker.translate import form_of

log = logging.getLogger(__name__)

AdapterWork = SaveAdapter | ImportAdapter | ExportAdapter


def content_of(engine: Engine, store: AdapterStore, digest: str) -> bytes:
    """A version as a trainer takes it, also one that was brought in another form. It takes long.

    Raises:
        PresetError: It cannot be read, or does not fit the model.
    """
    brought = store.brought_path(digest)
    if brought is None:
        return store.content(digest)
    return engine.import_named_adapter(brought, digest)


class AdapterFiles:
    """Answers each command with one event.

    Args:
        engine: Knows the formats.
        store: Of versions.
        send: Takes events, on any thread.
    """

    def __init__(
        self, engine: Engine, store: AdapterStore, send: Callable[[list[TrainingEvent]], None]
    ) -> None:
        self._engine = engine
        self._store = store
        self._send = send
        self._saving = ThreadPoolExecutor(1, "save")
        self._converting = ThreadPoolExecutor(1, "convert")

    def do(self, command: AdapterWork) -> None:
        """Begins; the answer comes later."""
        is_short = isinstance(command, SaveAdapter)
        (self._saving if is_short else self._converting).submit(self._answer, command)

    def _answer(self, command: AdapterWork) -> None:
        try:
            event = self._done(command)
        except ModelError as error:
            log.error("%s", error)
            code = "adapter_not_found" if isinstance(command, SaveAdapter) else "invalid_field"
            event = self._failed(command, code, str(error))
        except OSError as error:
            log.error("%s failed: %s", type(command).__name__, error)
            code = "storage_full" if is_full(error) else "internal"
            event = self._failed(command, code, f"The file cannot be written: {error.strerror}.")
        except Exception:
            log.exception("%s failed", type(command).__name__)
            event = self._failed(command, "internal", "The log has the details.")
        self._send([event])

    def _done(self, command: AdapterWork) -> TrainingEvent:
        if isinstance(command, ImportAdapter):
            content = self._engine.import_adapter(Path(command.path), command.format)
            form = form_of(self._engine.adapter_form(content))
            digest = self._store.add_content(content)
            return AdapterImported(command.request_id, digest, form, len(content))
        if command.digest not in self._store:
            return self._failed(command, "adapter_not_found", "This adapter version is not here.")
        if isinstance(command, ExportAdapter):
            path = Path(command.path)
            try:
                content = content_of(self._engine, self._store, command.digest)
            except ModelError as error:
                log.error("%s", error)
                return self._failed(command, "adapter_not_found", ADAPTER_GONE)
            self._engine.export_adapter(content, path, command.format)
            return AdapterExported(command.request_id, path.stat().st_size)
        content = self._store.content(command.digest)
        path = write_record(Path(command.folder), ADAPTER_FILE, content)
        source = AdapterSource(command.digest, str(path))
        self._store.add_source(source)
        return AdapterSaved(command.request_id, source)

    @staticmethod
    def _failed(command: AdapterWork, code: str, detail: str) -> AdapterFailed:
        return AdapterFailed(command.request_id, code, detail)
