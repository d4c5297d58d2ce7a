"""Which adapter is in which slot of the engine's bank. The loop's; plain Python.

Whoever runs claims its adapter first and releases it at the end; meanwhile nobody else gets its
slot. An adapter that nobody has claimed stays where it is until its slot is needed, and of several
the one goes that was claimed longest ago.

Where everything is claimed, whoever is next must wait; those behind may pass, but one adapter, the
one that was claimed longest ago, is claimed no more until somebody who waits has its slot. So
nobody waits for ever, and only those wait longer who want that one. Whoever compares versions
claims all of them or none, and waits for as many slots as are missing. Of what there are two lines
for, each slot that one gets is the other's next, if it waits for more than it could be promised.

An adapter that is not there is opened when it is wanted, and is the version that was named or none.
Whoever was admitted *holds* its version, so one that is forgotten stays until they have ended.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from model.slots import Adapter, Engine
from service.protocol.worker_counts import AdapterCounts
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
        # Those that are claimed no more, by the line in which somebody waits for their slot, and
        # how many more are wanted there.
        self._leaving: dict[Hashable, list[str]] = {}
        self._num_wanted: dict[Hashable, int] = {}
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

    def hold_all(self, digests: Sequence[str | None]) -> None:
        """Somebody was admitted who will claim all of these."""
        for digest in digests:
            self.hold(digest)

    def let_go_all(self, digests: Sequence[str | None]) -> None:
        """They have ended."""
        for digest in digests:
            self.let_go(digest)

    def begin_round(self, line: Hashable) -> None:
        """All of a line are asked anew, in order, so nobody of it waits for a slot so far."""
        self._leaving.pop(line, None)
        self._num_wanted.pop(line, None)

    def claim(self, digest: str | None, line: Hashable = None) -> bool:
        """Gives a version a slot that it keeps until it is released; False if there is none.

        None is the base, which needs no slot.

        Args:
            digest: Of the version.
            line: In which whoever claims it stands.
        """
        return self.claim_all((digest,), line)

    def claim_all(self, digests: Sequence[str | None], line: Hashable = None) -> bool:
        """Does so for all of them, or for none. There are no more of them than slots."""
        wanted = list(dict.fromkeys(digest for digest in digests if digest is not None))
        awaited = self._awaited
        missing = [digest for digest in wanted if digest not in self._residents]
        if any(digest in awaited for digest in wanted if digest not in missing):
            return False
        others = [each for each in self._residents if each not in awaited and each not in wanted]
        unused = [digest for digest in others if self._residents[digest].num_claims == 0]
        if len(missing) > len(self._free_slots) + len(unused):
            # Those that nobody uses first, or somebody behind would take them.
            others.sort(key=lambda digest: digest not in unused)
            self._wait(line, others, len(missing) - len(self._free_slots))
            return False
        for digest in missing:
            slot = self._free_slots.pop() if self._free_slots else self._evict(unused.pop(0))
            self._residents[digest] = _Resident(slot)
            self._promise(digest, line)
        for digest in wanted:
            self._residents[digest].num_claims += 1
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

    def release_all(self, digests: Sequence[str | None]) -> None:
        """Does so for all of them."""
        for digest in {digest for digest in digests if digest is not None}:
            self.release(digest)

    def _open(self, digest: str) -> Adapter:
        if path := self.store.brought_path(digest):
            return self._engine.read_adapter(path, digest)
        return self._engine.open_adapter(self.store.content(digest))

    def _write(self, resident: _Resident, adapter: Adapter) -> None:
        self._engine.put_adapter(resident.slot, adapter)
        resident.is_there = True
        self._num_loads += 1

    def _evict(self, digest: str) -> int:
        """The slot of one that nobody has claimed."""
        self._num_evictions += 1
        return self._residents.pop(digest).slot

    @property
    def _awaited(self) -> set[str]:
        """Those that are claimed no more."""
        return {digest for digests in self._leaving.values() for digest in digests}

    def _wait(self, line: Hashable, others: Sequence[str], count: int) -> None:
        """The next slots that could be had are for somebody who waits in this line."""
        leaving = others[:count]
        self._leaving.setdefault(line, []).extend(leaving)
        self._num_wanted[line] = self._num_wanted.get(line, 0) + count - len(leaving)

    def _promise(self, digest: str, line: Hashable) -> None:
        """Somebody of a line gets a slot with this version, which is another line's afterwards."""
        for other, count in self._num_wanted.items():
            if other != line and count > 0:
                self._leaving.setdefault(other, []).append(digest)
                self._num_wanted[other] = count - 1
                return
