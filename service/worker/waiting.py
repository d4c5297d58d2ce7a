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

So within a priority nobody starves. The marks of those who wait are never further apart than the
most costly row, and before a row that comes when its tenant has ``b`` tokens in line, each other
tenant is served at most ``b`` tokens and two such rows.
"""

from collections import OrderedDict
from collections.abc import Iterable
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


class WaitingLine(Generic[RowT]):
    """Rows in the order described above."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level[RowT]] = {}
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def add(self, rows: Iterable[RowT]) -> None:
        """Puts rows behind the others of their tenant and priority, in order."""
        for row in rows:
            self._levels.setdefault(row.priority, _Level()).add(row)
            self._num_rows += 1

    def peek(self) -> RowT | None:
        """The next row; it stays. Who comes later may still come before it."""
        return self._highest().peek() if self._levels else None

    def pop(self) -> RowT:
        """The next row, which leaves the line to be served; there must be one."""
        row = self._highest().pop()
        self._left(row)
        return row

    def remove(self, row: RowT) -> None:
        """The row leaves unserved. A row that does not wait is none of ours."""
        level = self._levels.get(row.priority)
        if level is not None and level.remove(row):
            self._left(row)

    def _highest(self) -> "_Level[RowT]":
        return self._levels[max(self._levels)]

    def _left(self, row: RowT) -> None:
        self._num_rows -= 1
        if self._levels[row.priority].is_empty:
            # Everybody had what they asked for, so nobody is owed anything.
            del self._levels[row.priority]


class _Tenant(Generic[RowT]):
    """The rows of one tenant, first come, first served, and where its next one starts."""

    def __init__(self, mark: int) -> None:
        self.rows: OrderedDict[RowT, int] = OrderedDict()
        self.mark = mark

    def first(self) -> tuple[RowT, int]:
        """Its next row, and when that came."""
        return next(iter(self.rows.items()))


class _Level(Generic[RowT]):
    """The rows of one priority."""

    def __init__(self) -> None:
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
        tenant.rows[row] = self._num_arrivals
        self._num_arrivals += 1
        self._num_rows += 1

    def peek(self) -> RowT:
        return self._next().first()[0]

    def pop(self) -> RowT:
        tenant = self._next()
        row, _ = tenant.rows.popitem(last=False)
        self._num_rows -= 1
        self._mark = tenant.mark
        tenant.mark += row.cost_tokens
        self._forget()
        return row

    def remove(self, row: RowT) -> bool:
        """Whether it waited."""
        tenant = self._tenants.get(row.tenant)
        if tenant is None or tenant.rows.pop(row, None) is None:
            return False
        self._num_rows -= 1
        self._forget()
        return True

    def _next(self) -> _Tenant[RowT]:
        """The tenant with the lowest mark; of several, the one whose row came first."""
        waiting = (tenant for tenant in self._tenants.values() if tenant.rows)
        return min(waiting, key=lambda tenant: (tenant.mark, tenant.first()[1]))

    def _forget(self) -> None:
        """Drops who would begin where the line is anyway."""
        gone = [
            name
            for name, tenant in self._tenants.items()
            if not tenant.rows and tenant.mark <= self._mark
        ]
        for name in gone:
            del self._tenants[name]
