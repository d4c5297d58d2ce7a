"""Who runs where, and what comes next. Plain Python: no arrays, no clock, no threads.

A row is one output of a request. It waits, gets a slot, has its prompt prefilled in chunks, decodes
with all other rows that do, and gives its slot back::

    submit -> waiting -> (slot) prefilling -> decoding -> remove

While rows decode, chunks and decode steps take turns, so a long prompt delays a running stream by
one chunk at a time and never by its whole length.

Outputs of one request that continue the same prompt share its prefill: the first one with a slot
prefills, and what it wrote is copied to the others that have a slot by then, before it decodes. A
later one prefills for itself, as decoding may have overwritten part of the prompt. Should the first
one leave before, the next one begins anew.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class RowKey(NamedTuple):
    """One output of one request."""

    request_id: str
    output: int


@dataclass(slots=True, eq=False)
class Row:
    """What the scheduler knows of one output.

    Attributes:
        key: Which output.
        num_prefill_tokens: Prompt tokens to prefill: all but the last, which is decoded.
        prompt_index: Which prompt of its request it continues.
        slot: Set while the row has one.
        num_prefilled: Of `num_prefill_tokens`.
    """

    key: RowKey
    num_prefill_tokens: int
    prompt_index: int = 0
    slot: int | None = None
    num_prefilled: int = 0

    @property
    def is_prefilled(self) -> bool:
        return self.num_prefilled >= self.num_prefill_tokens

    def shares_prompt_with(self, other: "Row") -> bool:
        """Whether both are outputs of the same prompt of the same request."""
        own = (self.key.request_id, self.prompt_index)
        return own == (other.key.request_id, other.prompt_index)


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prefill prompt tokens ``start`` to ``end`` of a row."""

    row: Row
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Give ``targets`` what was prefilled for ``source``."""

    source: Row
    targets: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Decode:
    """One decode step of these rows."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing to do until something is submitted."""


Action = Prefill | Copy | Decode | Idle


class Scheduler:
    """Queues and slots.

    Args:
        num_slots: Rows that hold a slot at once.
        chunk_tokens: Longest prefill chunk; chunks start at multiples of it.
    """

    def __init__(self, num_slots: int, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._free_slots = deque(range(num_slots))
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._prefilled_last = False
        # The row whose slot holds its prompt and nothing decoded yet.
        self._copy_source: Row | None = None

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def submit(self, rows: Iterable[Row]) -> None:
        """Puts rows at the end of the queue, in order."""
        self._waiting.extend(rows)

    def start_waiting(self) -> list[Row]:
        """Gives free slots to the rows that waited longest; returns those that got one."""
        started = []
        while self._waiting and self._free_slots:
            row = self._waiting.popleft()
            row.slot = self._free_slots.popleft()
            self._running.append(row)
            started.append(row)
        return started

    def next_action(self) -> Action:
        """What to do now. The caller does it, records it, and then calls this again."""
        if copy := self._due_copy():
            return copy
        prefilling = next((row for row in self._running if not row.is_prefilled), None)
        decoding = tuple(row for row in self._running if row.is_prefilled)
        if prefilling is not None and not (decoding and self._prefilled_last):
            self._prefilled_last = True
            start = prefilling.num_prefilled
            end = min(start + self._chunk_tokens, prefilling.num_prefill_tokens)
            return Prefill(prefilling, start, end)
        self._prefilled_last = False
        self._copy_source = None
        return Decode(decoding) if decoding else Idle()

    def record_prefill(self, action: Prefill) -> None:
        """The chunk is in the cache."""
        action.row.num_prefilled = action.end
        if action.row.is_prefilled:
            self._copy_source = action.row

    def record_copy(self, action: Copy) -> None:
        """The prompt is in the cache of every target."""
        for row in action.targets:
            row.num_prefilled = row.num_prefill_tokens

    def remove(self, row: Row) -> None:
        """The row ended, wherever it stood; its slot is free. May be called twice."""
        if row is self._copy_source:
            self._copy_source = None
        if row.slot is not None:
            self._running.remove(row)
            self._free_slots.append(row.slot)
            row.slot = None
        elif row in self._waiting:
            self._waiting.remove(row)

    def _due_copy(self) -> Copy | None:
        """A copy is short, so it takes no turn of chunks and steps: it happens at once."""
        source = self._copy_source
        if source is None:
            return None
        targets = tuple(
            row for row in self._running if not row.is_prefilled and row.shares_prompt_with(source)
        )
        return Copy(source, targets) if targets else None
