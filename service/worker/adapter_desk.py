"""Which adapter is in which slot of the engine's bank. The loop's; plain Python.

Whoever runs claims its adapter first and releases it at the end; meanwhile nobody else gets its
slot. An adapter that nobody has claimed stays where it is until its slot is needed, and of several
the one goes that was claimed longest ago. Where everything is claimed, whoever is next must wait.

An adapter that is not there is read from its file when it is wanted, and is the version that was
named or none: its digest is checked every time.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.slots import Engine
from service.protocol.messages import AdapterCounts, AdapterSource

BASE_SLOT = 0
# What a client is told; the log has the rest.
ADAPTER_GONE = "The adapter cannot be read any more."


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
        sources: Where versions lie.
    """

    def __init__(self, engine: Engine, sources: Sequence[AdapterSource] = ()) -> None:
        self._engine = engine
        self._paths = {source.digest: Path(source.path) for source in sources}
        self._free_slots = list(range(engine.info.adapter_slots, BASE_SLOT, -1))
        # The one that was claimed longest ago is the first.
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._num_loads = 0
        self._num_evictions = 0

    @property
    def digests(self) -> frozenset[str]:
        """Versions that may be asked for."""
        return frozenset(self._paths)

    @property
    def counts(self) -> AdapterCounts:
        """For metrics."""
        num_resident = sum(resident.is_there for resident in self._residents.values())
        return AdapterCounts(num_resident, self._num_loads, self._num_evictions)

    def open_all(self) -> None:
        """Reads every version once, so that a bad file ends the start; keeps as many as fit.

        Raises:
            PresetError: The message names the file.
        """
        for digest, path in self._paths.items():
            adapter = self._engine.read_adapter(path, digest)
            if self._free_slots:
                resident = self._residents[digest] = _Resident(self._free_slots.pop())
                self._write(resident, adapter)

    def claim(self, digest: str | None) -> bool:
        """Gives a version a slot that it keeps until it is released; False if there is none.

        None is the base, which needs no slot.
        """
        if digest is None:
            return True
        resident = self._residents.get(digest)
        if resident is None:
            slot = self._free_slots.pop() if self._free_slots else self._evicted()
            if slot is None:
                return False
            resident = self._residents[digest] = _Resident(slot)
        resident.num_claims += 1
        self._residents.move_to_end(digest)
        return True

    def slot(self, digest: str | None) -> int:
        """The slot of a version that is claimed, read and written if it is not there yet.

        Raises:
            PresetError: Its file is not what it was.
        """
        if digest is None:
            return BASE_SLOT
        resident = self._residents[digest]
        if not resident.is_there:
            self._write(resident, self._engine.read_adapter(self._paths[digest], digest))
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

    def _write(self, resident: _Resident, adapter: object) -> None:
        self._engine.put_adapter(resident.slot, adapter)
        resident.is_there = True
        self._num_loads += 1

    def _evicted(self) -> int | None:
        """A slot that nobody has claimed."""
        for digest, resident in self._residents.items():
            if resident.num_claims == 0:
                del self._residents[digest]
                self._num_evictions += 1
                return resident.slot
        return None
