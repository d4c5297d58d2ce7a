"""The line of rows that wait for a slot. Plain Python: no arrays, no clock.

Who is next:

1. the highest priority; as long as somebody of a higher one waits, nobody of a lower one is served;
2. within a priority, the tenant that was served the fewest tokens, so that everybody who waits gets
   the same number of them, whether in few long rows or in many short ones;
3. within a tenant, whoever came first.

Tokens are counted by start-time fair queuing. Every tenant has a mark, which each of its rows moves
on by what the row may cost; the lowest mark is next, and the last one served is where the line is.
A tenant that comes begins there: what it did not ask for while it was away is no credit, and what
it was served just before is not forgotten. A row that is taken out unserved costs nothing.

Rows of one *lane* need the same thing beside a turn. Whoever serves them may block lanes, for which
that is not there yet: then their rows are passed over, and keep their place.

So within a priority nobody starves. The marks of those who wait are never further apart than the
most costly row, and before a row that comes when its tenant has ``b`` tokens in line, each other
tenant is served at most ``b`` tokens and two such rows.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """What the line knows of a row."""

    @property
    def tenant(self) -> str: ...

    @property
    def priority(self) -> int: ...

    @property
    def cost_tokens(self) -> int: ...


RowT = TypeVar("RowT", bound=Waiter)
Blocked = Collection[Hashable]


def _one_lane(_row: object) -> Hashable:
    return None


class WaitingLine(Generic[RowT]):
    """Rows in the order described above.

    Args:
        lane: Of a row; it stays the same.
    """

    def __init__(self, lane: Callable[[RowT], Hashable] = _one_lane) -> None:
        self._lane = lane
        self._levels: dict[int, _Level[RowT]] = {}
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def add(self, rows: Iterable[RowT]) -> None:
        """Puts rows behind the others of their tenant and priority, in order."""
        for row in rows:
            level = self._levels.setdefault(row.priority, _Level(self._lane))
            level.add(row)
            self._num_rows += 1

    def peek(self, blocked: Blocked = ()) -> RowT | None:
        """The next row that is not of a blocked lane; it stays. Who comes later may still come
        before it.
        """
        for priority in sorted(self._levels, reverse=True):
            if row := self._levels[priority].peek(blocked):
                return row
        return None

    def pop(self, blocked: Blocked = ()) -> RowT:
        """The same row, which leaves the line to be served; there must be one."""
        row = self.peek(blocked)
        assert row is not None, "nobody is there to be served"
        self._levels[row.priority].pop(blocked)
        self._left(row)
        return row

    def remove(self, row: RowT) -> None:
        """The row leaves unserved. A row that does not wait is none of ours."""
        level = self._levels.get(row.priority)
        if level is not None and level.remove(row):
            self._left(row)

    def _left(self, row: RowT) -> None:
        self._num_rows -= 1
        if self._levels[row.priority].is_empty:
            # Everybody had what they asked for, so nobody is owed anything.
            del self._levels[row.priority]


class _Tenant(Generic[RowT]):
    """The rows of one tenant, first come, first served, and where its next one starts."""

    def __init__(self, mark: int) -> None:
        self.lanes: dict[Hashable, OrderedDict[RowT, int]] = {}
        self.mark = mark

    def first(self, blocked: Blocked = ()) -> tuple[RowT, int] | None:
        """Its next row, and when that came; of lanes that are not blocked, if there are any."""
        firsts = [
            next(iter(rows.items())) for lane, rows in self.lanes.items() if lane not in blocked
        ]
        return min(firsts, key=lambda first: first[1], default=None)

    def add(self, lane: Hashable, row: RowT, number: int) -> None:
        self.lanes.setdefault(lane, OrderedDict())[row] = number

    def remove(self, lane: Hashable, row: RowT) -> bool:
        """Whether it waited."""
        rows = self.lanes.get(lane)
        if rows is None or rows.pop(row, None) is None:
            return False
        if not rows:
            del self.lanes[lane]
        return True


class _Level(Generic[RowT]):
    """The rows of one priority."""

    def __init__(self, lane: Callable[[RowT], Hashable]) -> None:
        self._lane = lane
        # Also those who wait no more, while their mark is ahead of the line.
        self._tenants: dict[str, _Tenant[RowT]] = {}
        self._num_arrivals = 0
        self._num_rows = 0
        # The mark of the row served last.
        self._mark = 0

    @property
    def is_empty(self) -> bool:
        return self._num_rows == 0

    def add(self, row: RowT) -> None:
        tenant = self._tenants.setdefault(row.tenant, _Tenant(self._mark))
        tenant.add(self._lane(row), row, self._num_arrivals)
        self._num_arrivals += 1
        self._num_rows += 1

    def peek(self, blocked: Blocked) -> RowT | None:
        """The next row: of the tenant with the lowest mark; of several, the one that came first."""
        firsts = [
            (tenant.mark, first[1], first[0])
            for tenant in self._tenants.values()
            if (first := tenant.first(blocked))
        ]
        return min(firsts, key=lambda each: each[:2])[2] if firsts else None

    def pop(self, blocked: Blocked) -> None:
        """The next row leaves, served."""
        row = self.peek(blocked)
        assert row is not None, "nobody is there to be served"
        tenant = self._tenants[row.tenant]
        tenant.remove(self._lane(row), row)
        self._num_rows -= 1
        # What it did not get while its lanes were blocked is no credit either.
        self._mark = max(tenant.mark, self._mark)
        tenant.mark = self._mark + row.cost_tokens
        self._forget()

    def remove(self, row: RowT) -> bool:
        """Whether it waited."""
        tenant = self._tenants.get(row.tenant)
        if tenant is None or not tenant.remove(self._lane(row), row):
            return False
        self._num_rows -= 1
        self._forget()
        return True

    def _forget(self) -> None:
        """Drops who would begin where the line is anyway."""
        gone = [
            name
            for name, tenant in self._tenants.items()
            if not tenant.lanes and tenant.mark <= self._mark
        ]
        for name in gone:
            del self._tenants[name]
