"""Which adapter is in which slot of the engine's bank. The loop's; plain Python.

Whoever runs claims its adapter first and releases it at the end; meanwhile nobody else gets its
slot. An adapter that nobody has claimed stays where it is until its slot is needed, and of several
the one goes that was claimed longest ago.

Where everything is claimed, whoever is next must wait; those behind may pass, but one adapter, the
one that was claimed longest ago, is claimed no more until somebody who waits has its slot. So
nobody waits for ever, and only those wait longer who want that one.

An adapter that is not there is opened when it is wanted, and is the version that was named or none.
Whoever was admitted *holds* its version, so one that is forgotten stays until they have ended.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from model.slots import Adapter, Engine
from service.protocol.messages import AdapterCounts
from service.worker.adapter_store import ADAPTER_GONE, AdapterStore

BASE_SLOT = 0
# A request whose version cannot be read: there is no such model here any more.
NO_ADAPTER = ("model_not_found", ADAPTER_GONE)


@dataclass(slots=True)
class _Resident:
    """An adapter that has a slot; ``is_there`` once it has been written."""

    slot: int
    num_claims: int = 0
    is_there: bool = False


class AdapterDesk:
    """The adapters of one worker.

    Args:
        engine: Has the bank.
        store: Has the versions.
    """

    def __init__(self, engine: Engine, store: AdapterStore) -> None:
        self._engine = engine
        self.store = store
        self._free_slots = list(range(engine.info.adapter_slots, BASE_SLOT, -1))
        # The one that was claimed longest ago is the first.
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        # Those that are claimed no more, by the line in which somebody waits for their slot.
        self._leaving: dict[Hashable, list[str]] = {}
        self._num_holds: dict[str, int] = {}
        self._num_loads = 0
        self._num_evictions = 0

    @property
    def counts(self) -> AdapterCounts:
        """For metrics."""
        num_resident = sum(resident.is_there for resident in self._residents.values())
        return AdapterCounts(num_resident, self._num_loads, self._num_evictions)

    def open_all(self) -> None:
        """Opens every version once, so that a bad file ends the start; keeps as many as fit.

        Raises:
            PresetError: The message names the file.
        """
        for digest in self.store.digests:
            adapter = self._open(digest)
            if self._free_slots:
                resident = self._residents[digest] = _Resident(self._free_slots.pop())
                self._write(resident, adapter)

    def hold(self, digest: str | None) -> None:
        """Somebody was admitted who will claim it."""
        if digest is not None:
            self._num_holds[digest] = self._num_holds.get(digest, 0) + 1

    def let_go(self, digest: str | None) -> None:
        """They have ended."""
        if digest is None:
            return
        self._num_holds[digest] -= 1
        if self._num_holds[digest] == 0:
            del self._num_holds[digest]
            self.drop_forgotten(digest)

    def drop_forgotten(self, digest: str) -> None:
        """Lets go of a version that was forgotten, unless somebody holds it still."""
        if digest in self._num_holds or not self.store.drop_forgotten(digest):
            return
        if resident := self._residents.pop(digest, None):
            assert resident.num_claims == 0, "claimed and not held"
            self._free_slots.append(resident.slot)

    def begin_round(self, line: Hashable) -> None:
        """All of a line are asked anew, in order, so nobody of it waits for a slot so far."""
        self._leaving.pop(line, None)

    def claim(self, digest: str | None, line: Hashable = None) -> bool:
        """Gives a version a slot that it keeps until it is released; False if there is none.

        None is the base, which needs no slot.

        Args:
            digest: Of the version.
            line: In which whoever claims it stands.
        """
        if digest is None:
            return True
        resident = self._residents.get(digest)
        if resident is None:
            slot = self._free_slots.pop() if self._free_slots else self._evicted(line)
            if slot is None:
                self._let_one_leave(line)
                return False
            resident = self._residents[digest] = _Resident(slot)
        elif any(digest in leaving for leaving in self._leaving.values()):
            return False
        resident.num_claims += 1
        self._residents.move_to_end(digest)
        return True

    def slot(self, digest: str | None) -> int:
        """The slot of a version that is claimed, opened and written if it is not there yet.

        Raises:
            PresetError: It cannot be read, or is not what was named.
        """
        if digest is None:
            return BASE_SLOT
        resident = self._residents[digest]
        if not resident.is_there:
            self._write(resident, self._open(digest))
        return resident.slot

    def release(self, digest: str | None) -> None:
        """Whoever claimed it runs no more."""
        if digest is None:
            return
        resident = self._residents[digest]
        assert resident.num_claims > 0, "released more often than claimed"
        resident.num_claims -= 1
        if resident.num_claims == 0 and not resident.is_there:
            del self._residents[digest]
            self._free_slots.append(resident.slot)

    def _open(self, digest: str) -> Adapter:
        if path := self.store.brought_path(digest):
            return self._engine.read_adapter(path, digest)
        return self._engine.open_adapter(self.store.content(digest))

    def _write(self, resident: _Resident, adapter: Adapter) -> None:
        self._engine.put_adapter(resident.slot, adapter)
        resident.is_there = True
        self._num_loads += 1

    def _evicted(self, line: Hashable) -> int | None:
        """A slot that nobody has claimed, and for which nobody of another line waits."""
        for digest, resident in self._residents.items():
            is_awaited = any(
                digest in leaving for other, leaving in self._leaving.items() if other != line
            )
            if resident.num_claims == 0 and not is_awaited:
                del self._residents[digest]
                self._num_evictions += 1
                return resident.slot
        return None

    def _let_one_leave(self, line: Hashable) -> None:
        """The next slot that could be had is for somebody who waits in this line."""
        leaving = [digest for digests in self._leaving.values() for digest in digests]
        for digest in self._residents:
            if digest not in leaving:
                self._leaving.setdefault(line, []).append(digest)
                return
