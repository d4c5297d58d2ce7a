"""What the scheduler knows of an output, and what it says is to be done. Plain Python."""

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
        tenant: Whose it is.
        priority: Higher ones get a slot first.
        cost_tokens: What it may cost: tokens of its prompt and of its completion.
        slot: Set while the row has one.
        num_prefilled: Of `num_prefill_tokens`.
        is_looked_up: Whether its leading chunks need not be looked for any more.
        num_slots: That it needs; more than one for a search.
        more_slots: Of a search, beside ``slot``.
        is_spread: Whether all slots of a search hold its prompt.
        newest_turn: Of a search, among the steps of all of them.
        adapter: Digest of the adapter version that it uses; None: the base.
        adapter_slot: Where that is while the row has a slot.
        may_join: Whether its prompt and its steps may be joined to those of others.
    """

    key: RowKey
    num_prefill_tokens: int
    prompt_index: int = 0
    tenant: str = "default"
    priority: int = 0
    cost_tokens: int = 1
    slot: int | None = None
    num_prefilled: int = 0
    is_looked_up: bool = False
    num_slots: int = 1
    more_slots: tuple[int, ...] = ()
    is_spread: bool = False
    newest_turn: int = 0
    adapter: str | None = None
    adapter_slot: int = 0
    may_join: bool = True

    @property
    def is_search(self) -> bool:
        return self.num_slots > 1

    @property
    def slots(self) -> tuple[int, ...]:
        """All that it has now."""
        return () if self.slot is None else (self.slot, *self.more_slots)

    @property
    def is_prefilled(self) -> bool:
        return self.num_prefilled >= self.num_prefill_tokens

    def shares_prompt_with(self, other: "Row") -> bool:
        """Whether both are outputs of the same prompt of the same request."""
        own = (self.key.request_id, self.prompt_index)
        return own == (other.key.request_id, other.prompt_index)


@dataclass(frozen=True, slots=True)
class LookUp:
    """Give a row the leading chunks of its prompt that are kept, if any."""

    row: Row


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens ``start`` to ``end`` of a row."""

    row: Row
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Go on with these chunks, which are prefilled together."""

    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Join:
    """A step of ``rows`` together with these chunks."""

    chunks: tuple[Chunk, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """Give ``targets`` what was prefilled for ``source``."""

    source: Row
    targets: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """Give all slots of a search what was prefilled in its first one."""

    row: Row


@dataclass(frozen=True, slots=True)
class Search:
    """One step of this search."""

    row: Row


@dataclass(frozen=True, slots=True)
class Decode:
    """One decode step of these rows."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class ReadScores:
    """One part of what is to be scored."""


@dataclass(frozen=True, slots=True)
class Train:
    """Some slices of training."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing to do until something is submitted."""


Action = LookUp | Prefill | Join | Copy | Spread | Decode | Search | ReadScores | Train | Idle
