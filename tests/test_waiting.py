"""service.worker.waiting: who is next, by example and in any order of calls."""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations, count

from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.worker.waiting import WaitingLine

MAX_COST = 9


@dataclass(eq=False)
class Row:
    name: str
    tenant: str = "a"
    cost_tokens: int = 1
    priority: int = 0


def line_of(*rows: Row) -> WaitingLine[Row]:
    line: WaitingLine[Row] = WaitingLine()
    line.add(rows)
    return line


def served(line: WaitingLine[Row], num_rows: int | None = None) -> str:
    """The names of the next rows, which leave the line; all of them unless told otherwise."""
    return " ".join(line.pop().name for _ in range(len(line) if num_rows is None else num_rows))


def test_one_tenant_is_served_in_the_order_of_arrival():
    line = line_of(Row("1", cost_tokens=9), Row("2"), Row("3", cost_tokens=5))
    assert served(line) == "1 2 3"


def test_a_higher_priority_comes_first_whatever_its_tenant_had():
    line = line_of(Row("low", priority=-8), Row("usual"), Row("1", "b", 9, 8), Row("2", "b", 9, 8))
    assert served(line) == "1 2 usual low"


def test_tenants_whose_rows_cost_the_same_take_turns():
    line = line_of(
        *(Row(f"a{k}") for k in range(3)), Row("b0", "b"), Row("b1", "b"), Row("c0", "c")
    )
    assert served(line) == "a0 b0 c0 a1 b1 a2"


def test_a_tenant_with_rows_of_four_tokens_gets_one_for_four_of_one_token():
    long = [Row(f"L{k}", "long", 4) for k in range(3)]
    short = [Row(f"s{k}", "short", 1) for k in range(12)]
    # Both begin at 0. L0 moves long to 4, which short reaches with its fourth row; then the row
    # that came first is next.
    assert served(line_of(*long, *short)) == "L0 s0 s1 s2 s3 L1 s4 s5 s6 s7 L2 s8 s9 s10 s11"


def test_rows_of_a_blocked_lane_are_passed_over_and_keep_their_place():
    line: WaitingLine[Row] = WaitingLine(lambda row: row.name[0])
    line.add([Row("x1"), Row("y1"), Row("x2"), Row("z1", "b"), Row("y2"), Row("x3", priority=5)])
    assert line.pop({"x"}).name == "y1"
    assert line.pop({"x", "z"}).name == "y2"
    assert line.peek({"x", "z"}) is None
    assert line.pop({"x"}).name == "z1"
    assert [line.pop().name for _ in range(len(line))] == ["x3", "x1", "x2"]


def test_what_a_tenant_missed_while_it_was_blocked_is_no_credit():
    line: WaitingLine[Row] = WaitingLine(lambda row: row.tenant)
    line.add([*(Row(f"a{k}", "a") for k in range(9)), *(Row(f"b{k}", "b") for k in range(9))])
    assert [line.pop({"a"}).name for _ in range(5)] == ["b0", "b1", "b2", "b3", "b4"]
    # Not a0 a1 a2 a3 a4 for the five that went before.
    assert [line.pop().name for _ in range(4)] == ["a0", "a1", "b5", "a2"]


def test_a_thousand_rows_of_one_tenant_hold_up_another_by_one_row():
    line = line_of(*(Row(f"a{k}", "a", 5) for k in range(1000)))
    assert served(line, 500).endswith("a499")
    line.add([Row("b", "b", 5)])
    # The line is where a499 began, and a500 begins behind that.
    assert served(line, 2) == "b a500"


def test_a_tenant_that_was_away_has_no_credit():
    line = line_of(Row("b0", "b"), *(Row(f"a{k}") for k in range(100)))
    assert served(line, 91).endswith("a89")
    line.add(Row(f"b{k}", "b") for k in range(1, 4))
    # Not b1 b2 b3 for the ninety rows that it let pass.
    assert served(line, 6) == "b1 a90 b2 a91 b3 a92"


def test_a_tenant_that_never_has_two_rows_in_line_is_not_served_more_for_it():
    line = line_of(*(Row(f"a{k}", "a", 2) for k in range(100)))
    line.add([Row("b", "b", 8)])
    tokens = {"a": 0, "b": 0}
    for _ in range(100):
        row = line.pop()
        tokens[row.tenant] += row.cost_tokens
        if row.tenant == "b":
            line.add([Row("b", "b", 8)])
    assert abs(tokens["a"] - tokens["b"]) <= 8


def test_once_nobody_waits_everybody_begins_anew():
    line = line_of(Row("a0", "a", 9))
    assert served(line) == "a0"
    line.add([Row("a1", "a"), Row("b0", "b")])
    assert served(line) == "a1 b0"
    assert line.peek() is None


def test_a_row_that_is_taken_out_costs_its_tenant_nothing():
    first, second = Row("a0", "a", 9), Row("a1", "a", 9)
    line = line_of(first, second, Row("b0", "b"), Row("b1", "b"))
    line.remove(first)
    line.remove(first)
    assert len(line) == 3
    assert served(line) == "a1 b0 b1"
    line.remove(second)
    assert len(line) == 0


COSTS = st.lists(st.integers(1, MAX_COST), min_size=1, max_size=30)


@given(costs=st.dictionaries(st.sampled_from("abcd"), COSTS, min_size=2))
@settings(deadline=None)
def test_tenants_that_wait_together_are_served_as_many_tokens_to_within_one_row(costs):
    line = line_of(
        *(Row(str(k), name, cost) for name in costs for k, cost in enumerate(costs[name]))
    )
    left = {name: len(rows) for name, rows in costs.items()}
    tokens = dict.fromkeys(costs, 0)
    while min(left.values()) > 0:
        row = line.pop()
        left[row.tenant] -= 1
        tokens[row.tenant] += row.cost_tokens
        assert max(tokens.values()) - min(tokens.values()) <= MAX_COST


@dataclass(eq=False)
class Promise:
    """A row that waits, and what others were served since it came."""

    row: Row
    tokens_ahead: int
    served: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class AnyOrder(RuleBasedStateMachine):
    """Rows come, are served and are taken out in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.line: WaitingLine[Row] = WaitingLine()
        self.waiting: list[Promise] = []
        self.names = count()
        # For two tenants of a priority that both wait: what each was served since they do.
        self.together: dict[tuple[int, str, str], dict[str, int]] = {}

    @rule(
        tenant=st.sampled_from("abcd"),
        costs=st.lists(st.integers(1, MAX_COST), min_size=1, max_size=6),
        priority=st.sampled_from([0, 0, 0, 1]),
    )
    def add(self, tenant: str, costs: list[int], priority: int) -> None:
        rows = [Row(str(next(self.names)), tenant, cost, priority) for cost in costs]
        for row in rows:
            ahead = sum(other.row.cost_tokens for other in self.queue_of(row))
            self.waiting.append(Promise(row, ahead))
        self.line.add(rows)

    @precondition(lambda self: self.waiting)
    @rule(num_rows=st.integers(1, 5))
    def serve(self, num_rows: int) -> None:
        for _ in range(min(num_rows, len(self.waiting))):
            expected = self.line.peek()
            row = self.line.pop()
            assert row is expected
            assert row.priority == max(each.row.priority for each in self.waiting)
            promise = self.queue_of(row)[0]
            assert promise.row is row, "within a tenant, first come, first served"
            self.waiting.remove(promise)
            for other, tokens in promise.served.items():
                assert tokens <= promise.tokens_ahead + 2 * MAX_COST, f"{other} held it up"
            for each in self.waiting:
                if each.row.priority == row.priority and each.row.tenant != row.tenant:
                    each.served[row.tenant] += row.cost_tokens
            for (priority, *_), tokens in self.together.items():
                if priority == row.priority and row.tenant in tokens:
                    tokens[row.tenant] += row.cost_tokens

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def take_out(self, data: st.DataObject) -> None:
        promise = data.draw(st.sampled_from(self.waiting))
        self.line.remove(promise.row)
        self.line.remove(promise.row)
        self.waiting.remove(promise)
        self.note_who_waits()

    @invariant()
    def nobody_is_lost(self) -> None:
        assert len(self.line) == len(self.waiting)
        assert (self.line.peek() is None) == (not self.waiting)

    @invariant()
    def note_who_waits(self) -> None:
        """Who waits together is served as much as the other, but for two rows."""
        tenants = {(each.row.priority, each.row.tenant) for each in self.waiting}
        pairs = {
            (priority, one, other)
            for (priority, one), (same, other) in combinations(sorted(tenants), 2)
            if priority == same
        }
        together = {}
        for pair in pairs:
            together[pair] = self.together.get(pair) or dict.fromkeys(pair[1:], 0)
            one, other = together[pair].values()
            assert abs(one - other) <= 2 * MAX_COST
        self.together = together

    def queue_of(self, row: Row) -> list[Promise]:
        """Who waits, of the same tenant and priority, in the order of arrival."""
        key = (row.priority, row.tenant)
        return [each for each in self.waiting if (each.row.priority, each.row.tenant) == key]


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
test_any_order_of_calls_keeps_every_promise = AnyOrder.TestCase
