"""Which passages are read next, and what shares a chunk. Plain Python: no arrays, no clock.

A passage is what is read in one slot: a text, or a context and then each of its continuations. It
is cut into pieces, which are read in order::

    submit -> waiting -> its pieces, one after another -> read

A piece of more than a packed chunk is read alone. Smaller ones share a chunk with what fits beside
them: further pieces of the same passage, and pieces of others. Which program a piece meets depends
on its own length only.

A short passage, all of which fits one chunk, is read at once. Its slot is the first one, which any
number of such passages of a chunk may have one after another. A long passage keeps one of the other
slots until it has been read, so a few at most are half read. Short and long ones take turns, and so
do the long ones among themselves: nobody waits for all of a long text. Within each kind
`service.worker.waiting` says who is next. A passage that needs adapters claims all of them before
its first piece; while it cannot, it has none, and those behind it that need others may pass.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from service.worker.actions import RowKey
from service.worker.scheduler import PrefillLimits
from service.worker.waiting import WaitingLine

_SHORT_SLOT = 0


@dataclass(frozen=True, slots=True)
class TargetToken:
    """A token that is asked about: where it stands in the request, and what it is."""

    input_index: int
    target_index: int
    token_index: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Asked:
    """Tokens that are asked about behind one place of a piece."""

    place: int
    tokens: tuple[TargetToken, ...]


@dataclass(frozen=True, slots=True)
class Marked:
    """Places of a piece that a part of the request is about.

    Attributes:
        number: Of the intervention, or of the capture, in its request.
        places: Ascending, at least one.
        targets: Of a capture: to whose texts the places belong, as pairs of input and target.
    """

    number: int
    places: tuple[int, ...]
    targets: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ScorePiece:
    """Consecutive tokens of a passage.

    Attributes:
        token_ids: At least one.
        start: Position of the first.
        asked: Places of the piece with what is asked there, ascending.
        touched: Where interventions act, in the order of the request.
        captured: Where something is captured, in that order too.
    """

    token_ids: tuple[int, ...]
    start: int
    asked: tuple[Asked, ...] = ()
    touched: tuple[Marked, ...] = ()
    captured: tuple[Marked, ...] = ()


@dataclass(slots=True, eq=False)
class Passage:
    """What is read in one slot.

    Attributes:
        key: Its request, and its number there.
        pieces: In order, at least one.
        tenant: Whose it is.
        priority: Higher ones are read first.
        slot: Set from its first piece to its last.
        num_read: Of its pieces.
        newest_turn: When it got its slot, or a turn of its own since, counted in chunks.
        adapter: Digest of the adapter version that it uses; None: the base.
        version: Which of the versions that its request compares that is.
        adapters: All of these. They are claimed together, so that none must be fetched again and
            again while the others are there.
        has_claim: Whether it has claimed them, and not released them.
    """

    key: RowKey
    pieces: tuple[ScorePiece, ...]
    tenant: str = "default"
    priority: int = 0
    slot: int | None = None
    num_read: int = 0
    newest_turn: int = 0
    adapter: str | None = None
    version: int = 0
    adapters: tuple[str | None, ...] = ()
    has_claim: bool = False

    @property
    def cost_tokens(self) -> int:
        """Tokens that are read for it."""
        return sum(len(piece.token_ids) for piece in self.pieces)

    @property
    def is_read(self) -> bool:
        return self.num_read == len(self.pieces)


class PlacedPiece(NamedTuple):
    """A piece of a chunk, and the slot that its passage has."""

    passage: Passage
    slot: int
    piece: ScorePiece


@dataclass(frozen=True, slots=True)
class Reading:
    """These pieces are read together."""

    pieces: tuple[PlacedPiece, ...]


@dataclass(slots=True)
class _Room:
    """What still fits into a chunk."""

    num_tokens: int
    num_pieces: int
    placed: list[PlacedPiece] = field(default_factory=list)

    def take_of(self, passage: Passage, slot: int) -> None:
        """As many of the next pieces of a passage as fit."""
        for piece in passage.pieces[passage.num_read :]:
            if len(piece.token_ids) > self.num_tokens or self.num_pieces == 0:
                return
            self.placed.append(PlacedPiece(passage, slot, piece))
            self.num_tokens -= len(piece.token_ids)
            self.num_pieces -= 1


def _adapters_of(passage: Passage) -> Hashable:
    return frozenset(passage.adapters)


class ScoreLine:
    """Passages that wait, and those that are half read.

    Args:
        num_slots: At least two.
        limits: Of chunks.
        claim: Takes the adapters of a passage, or says False.
        release: Gives them back.
    """

    def __init__(
        self,
        num_slots: int,
        limits: PrefillLimits,
        claim: Callable[[Sequence[str | None]], bool] = lambda _adapters: True,
        release: Callable[[Sequence[str | None]], None] = lambda _adapters: None,
    ) -> None:
        assert num_slots > 1, "short passages need a slot beside the long ones"
        self._limits = limits
        self._claim = claim
        self._release = release
        self._free_slots = deque(range(_SHORT_SLOT + 1, num_slots))
        self._short: WaitingLine[Passage] = WaitingLine(_adapters_of)
        self._long: WaitingLine[Passage] = WaitingLine(_adapters_of)
        # Adapters that cannot be claimed together in this chunk.
        self._blocked: set[Hashable] = set()
        self._half_read: list[Passage] = []
        self._num_turns = 0
        self._was_short_turn = False

    @property
    def has_work(self) -> bool:
        """Whether anything is to be read."""
        return bool(self._short or self._long or self._half_read)

    def submit(self, passages: Iterable[Passage]) -> None:
        """Lets passages wait."""
        for passage in passages:
            (self._short if self._is_short(passage) else self._long).add([passage])

    def next_reading(self) -> Reading:
        """What to read now; nothing while no adapter can be claimed.

        Short passages that are in it wait no more.
        """
        self._blocked.clear()
        self._start_long()
        room = _Room(self._limits.packed_tokens, self._limits.packed_prompts)
        self._num_turns += 1
        self._was_short_turn = bool(self._short) and not (self._half_read and self._was_short_turn)
        if self._was_short_turn:
            self._take_short(room)
            self._take_long(room)
        elif self._half_read:
            first = min(self._half_read, key=lambda passage: passage.newest_turn)
            first.newest_turn = self._num_turns
            assert first.slot is not None, "it is half read"
            piece = first.pieces[first.num_read]
            if len(piece.token_ids) > self._limits.packed_tokens:
                return Reading((PlacedPiece(first, first.slot, piece),))
            self._take_long(room)
            self._take_short(room)
        return Reading(tuple(room.placed))

    def record_reading(self, reading: Reading) -> None:
        """The pieces have been read."""
        for placed in reading.pieces:
            placed.passage.num_read += 1
            if placed.passage.is_read:
                self._leave(placed.passage)

    def remove(self, passage: Passage) -> None:
        """It is not to be read any more, wherever it stood. May be called twice."""
        self._short.remove(passage)
        self._long.remove(passage)
        self._leave(passage)

    def _is_short(self, passage: Passage) -> bool:
        return (
            passage.cost_tokens <= self._limits.packed_tokens
            and len(passage.pieces) <= self._limits.packed_prompts
        )

    def _start_long(self) -> None:
        while self._free_slots and (waiting := self._long.peek(self._blocked)):
            if not self._has_claimed(waiting):
                continue
            passage = self._long.pop(self._blocked)
            passage.slot = self._free_slots.popleft()
            passage.newest_turn = self._num_turns
            self._half_read.append(passage)

    def _take_long(self, room: _Room) -> None:
        """Next pieces of those that are half read; whose turn it is comes first."""
        in_order = sorted(self._half_read, key=lambda passage: passage.newest_turn)
        in_order.sort(key=lambda passage: passage.newest_turn != self._num_turns)
        for passage in in_order:
            assert passage.slot is not None, "it is half read"
            room.take_of(passage, passage.slot)

    def _take_short(self, room: _Room) -> None:
        while passage := self._short.peek(self._blocked):
            fits = passage.cost_tokens <= room.num_tokens
            if not fits or len(passage.pieces) > room.num_pieces:
                return
            if not self._has_claimed(passage):
                continue
            self._short.pop(self._blocked)
            room.take_of(passage, _SHORT_SLOT)

    def _has_claimed(self, passage: Passage) -> bool:
        """Or its lane is blocked."""
        passage.has_claim = self._claim(passage.adapters)
        if not passage.has_claim:
            self._blocked.add(_adapters_of(passage))
        return passage.has_claim

    def _leave(self, passage: Passage) -> None:
        if passage.has_claim:
            passage.has_claim = False
            self._release(passage.adapters)
        if passage in self._half_read:
            self._half_read.remove(passage)
        if passage.slot is not None:
            self._free_slots.append(passage.slot)
            passage.slot = None
