"""Who runs where, and what comes next. Plain Python: no arrays, no clock, no threads.

A row is one output of a request. It waits, gets a slot, has its prompt prefilled in chunks, decodes
with all other rows that do, and gives its slot back::

    submit -> waiting -> (slot) looking up -> prefilling -> decoding -> remove

Who gets a slot next is told in `service.worker.waiting`. A row may need an adapter beside its slot;
while there is no room for that one, it waits, and those behind that need another one or none may
pass (`service.worker.adapter_desk` says how long).

While rows decode, parts of a chunk and decode steps take turns, so a long prompt delays a running
stream by one part at a time and never by its whole length. How long a part is, the caller decides:
it is asked for the same chunk again until it has recorded it. Short prompts share a chunk. Where
the engine can join a step to a part of prompts, both are one turn.

A prompt of whole chunks is looked up once, when it is its turn: what an earlier prompt left need
not be prefilled, and what is being prefilled before it is there by then.

Outputs of one request that continue the same prompt share its prefill: the first one with a slot
prefills, and what it wrote is copied to the others that have a slot by then, before it decodes. A
later one prefills for itself, as decoding may have overwritten part of the prompt. Should the first
one leave before, the next one begins anew.

A search is a row with several slots. It gets them together, so it may have to wait at the head of
the line, and what comes behind it waits too. Its prompt is prefilled once and spread over its slots
at once. From then on every step is a dispatch of its own::

    submit -> waiting -> (slots) looking up -> prefilling -> spread -> searching -> remove

Parts of chunks, decode steps and steps of searches take turns, and so do several searches among
themselves: nobody waits for more than one turn of another kind. Scores and training need no slot of
these; the scheduler only knows whether there are any, and gives them their turns, never two parts,
of prompts, of scores or of training, without a step between them. Training has turns only as far as
it is due, or when nobody else wants them.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from service.worker.actions import (
    Action,
    Chunk,
    Copy,
    Decode,
    Idle,
    Join,
    LookUp,
    Prefill,
    ReadScores,
    Row,
    Search,
    Spread,
    Train,
)
from service.worker.waiting import WaitingLine


@dataclass(frozen=True, slots=True)
class PrefillLimits:
    """What one chunk may hold.

    Attributes:
        chunk_tokens: Of one prompt; chunks end at multiples of it, or with their prompt.
        packed_tokens: Of several prompts together.
        packed_prompts: How many these may be.
        joined_tokens: Of all prompts that a step is joined to; 0: none can be.
        joined_rows: Rows of such a step.
    """

    chunk_tokens: int
    packed_tokens: int = 0
    packed_prompts: int = 1
    joined_tokens: int = 0
    joined_rows: int = 0


_Turn = type[Prefill | Decode | Search | ReadScores | Train]
_Part = type[Prefill | ReadScores | Train]


def _adapter_of(row: "Row") -> Hashable:
    return row.adapter


class Scheduler:
    """Queues and slots.

    Args:
        num_slots: Rows that hold a slot at once.
        limits: Of prefill.
        keeps_prefixes: Whether there is anything to look up.

    Attributes:
        has_scores: Whether anything is to be scored; set by the caller.
        has_training: Whether a job trains; set by the caller.
        is_training_due: Whether it is its turn even while others wait; set by the caller.
    """

    def __init__(
        self, num_slots: int, limits: PrefillLimits, *, keeps_prefixes: bool = False
    ) -> None:
        self._limits = limits
        self._keeps_prefixes = keeps_prefixes
        self._free_slots = deque(range(num_slots))
        self._waiting: WaitingLine[Row] = WaitingLine(_adapter_of)
        self._running: list[Row] = []
        self._last_turn: _Turn = Search
        # What pauses for steps; whose turn is longest ago comes first.
        self._parts: list[_Part] = [Prefill, ReadScores, Train]
        self.has_scores = False
        self.has_training = False
        self.is_training_due = False
        self._num_search_turns = 0
        # Begun and not recorded yet.
        self._chunks: Prefill | None = None
        # Rows whose slot holds their prompt and nothing decoded yet.
        self._copy_sources: list[Row] = []

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def is_pressed(self) -> bool:
        """Whether anything waits for a slot, for its prefill or for a turn of its own."""
        waits = (row.is_search or not row.is_prefilled for row in self._running)
        return bool(self._waiting) or self.has_scores or self.has_training or any(waits)

    @property
    def has_others(self) -> bool:
        """Whether anybody but training wants a turn."""
        return bool(self._running) or self.has_scores

    @property
    def num_decoding(self) -> int:
        """Rows that have their whole prompt."""
        return sum(row.is_prefilled for row in self._running)

    def submit(self, rows: Iterable[Row]) -> None:
        """Lets rows wait for a slot."""
        self._waiting.add(rows)

    def start_waiting(self, claim: Callable[[Row], bool] = lambda _row: True) -> list[Row]:
        """Gives free slots to the rows that are next; returns those that got theirs.

        A search takes all of its slots or none, and nobody behind it passes it. One whose adapter
        cannot be there yet is passed by those with others.

        Args:
            claim: Takes whatever else the row needs, or says False.
        """
        started = []
        blocked: set[Hashable] = set()
        while row := self._waiting.peek(blocked):
            if row.num_slots > len(self._free_slots):
                break
            if not claim(row):
                blocked.add(row.adapter)
                continue
            self._waiting.pop(blocked)
            row.slot, *more = (self._free_slots.popleft() for _ in range(row.num_slots))
            row.more_slots = tuple(more)
            row.is_looked_up = not (
                self._keeps_prefixes and row.num_prefill_tokens >= self._limits.chunk_tokens
            )
            self._running.append(row)
            started.append(row)
        return started

    def next_action(self) -> Action:
        """What to do now. The caller does it, records it, and then calls this again."""
        if copy := self._due_copy():
            return copy
        prefilling = [row for row in self._running if not row.is_prefilled]
        decoding = tuple(row for row in self._running if row.is_prefilled and not row.is_search)
        searching = [row for row in self._running if row.is_prefilled and row.is_search]
        waits = {
            Prefill: bool(prefilling),
            Decode: bool(decoding),
            Search: bool(searching),
            ReadScores: self.has_scores,
            Train: self.has_training and (self.is_training_due or not self.has_others),
        }
        turn = next((kind for kind in self._turns() if waits[kind]), None)
        if turn is ReadScores:
            self._had_part(ReadScores)
            return ReadScores()
        if turn is Train:
            self._had_part(Train)
            return Train()
        if turn is Prefill:
            if self._chunks is None and not prefilling[0].is_looked_up:
                return LookUp(prefilling[0])
            self._had_part(Prefill)
            if self._chunks is None and self._may_join(prefilling, decoding):
                # It is a step too.
                self._last_turn = Decode
                return self._next_join(prefilling, decoding)
            self._chunks = self._chunks or self._next_chunks(prefilling)
            return self._chunks
        if turn is Search:
            self._last_turn = Search
            return self._next_search(searching)
        self._last_turn = Decode
        self._copy_sources = []
        return Decode(decoding) if decoding else Idle()

    def record_look_up(self, row: Row, num_chunks: int) -> None:
        """The first ``num_chunks`` chunks of a row are in its slot."""
        row.is_looked_up = True
        row.num_prefilled = num_chunks * self._limits.chunk_tokens
        if row.is_prefilled:
            self._copy_sources.append(row)

    def record_prefill(self, action: Prefill | Join) -> None:
        """The chunks are in the cache."""
        self._chunks = None
        for chunk in action.chunks:
            chunk.row.num_prefilled = chunk.end
            if chunk.row.is_prefilled:
                self._copy_sources.append(chunk.row)

    def record_copy(self, action: Copy) -> None:
        """The prompt is in the cache of every target."""
        for row in action.targets:
            row.num_prefilled = row.num_prefill_tokens

    def record_spread(self, action: Spread) -> None:
        """The prompt is in every slot of the search."""
        action.row.is_spread = True

    def remove(self, row: Row) -> None:
        """The row ended, wherever it stood; its slot is free. May be called twice."""
        if row in self._copy_sources:
            self._copy_sources.remove(row)
        if self._chunks and any(chunk.row is row for chunk in self._chunks.chunks):
            self._chunks = None
        if row.slot is not None:
            self._running.remove(row)
            self._free_slots.extend(row.slots)
            row.slot, row.more_slots = None, ()
        else:
            self._waiting.remove(row)

    def _may_join(self, prefilling: list[Row], decoding: tuple[Row, ...]) -> bool:
        is_few = 0 < len(decoding) <= self._limits.joined_rows
        return is_few and all(row.may_join for row in (prefilling[0], *decoding))

    def _next_join(self, prefilling: list[Row], decoding: tuple[Row, ...]) -> Join:
        """A part of the first row's prompt, whole rests of others, and a step of ``decoding``."""
        others = [row for row in prefilling[1:] if row.may_join]
        most = self._limits.joined_tokens
        self._copy_sources = []
        return Join(self._packed([prefilling[0], *others], most, most), decoding)

    def _turns(self) -> "list[_Turn]":
        """Who is next, whoever waits. A part follows a step, and a step a part."""
        if self._last_turn is Decode:
            return [Search, *self._parts, Decode]
        if self._last_turn is Search:
            return [*self._parts, Decode, Search]
        return [Decode, Search, *self._parts]

    def _had_part(self, part: _Part) -> None:
        self._last_turn = part
        self._parts.remove(part)
        self._parts.append(part)

    def _next_chunks(self, prefilling: list[Row]) -> Prefill:
        """The next chunk of the first row, with the last chunks of others that fit beside it."""
        limits = self._limits
        return Prefill(self._packed(prefilling, limits.chunk_tokens, limits.packed_tokens))

    def _packed(
        self, prefilling: list[Row], first_tokens: int, all_tokens: int
    ) -> tuple[Chunk, ...]:
        """Up to ``first_tokens`` of the first row; what is left of others, if it fits beside."""
        first, *others = prefilling
        chunks = [self._next_chunk(first, first_tokens)]
        room = all_tokens - (chunks[0].end - chunks[0].start)
        for row in others:
            chunk = self._next_chunk(row)
            num_tokens = chunk.end - chunk.start
            is_last = chunk.end == row.num_prefill_tokens and row.is_looked_up
            # Outputs of one prompt get a copy of what the first of them prefills.
            is_copied = any(row.shares_prompt_with(each.row) for each in chunks)
            if num_tokens <= room and is_last and not is_copied:
                chunks.append(chunk)
                room -= num_tokens
            if len(chunks) == self._limits.packed_prompts:
                break
        return tuple(chunks)

    def _next_chunk(self, row: Row, most: int | None = None) -> Chunk:
        start, of_block = row.num_prefilled, self._limits.chunk_tokens
        end = min((start // of_block + 1) * of_block, row.num_prefill_tokens)
        return Chunk(row, start, end if most is None else min(end, start + most))

    def _next_search(self, searching: list[Row]) -> Search:
        """The search that waits longest; one that is new is next."""
        row = min(searching, key=lambda row: row.newest_turn)
        self._num_search_turns += 1
        row.newest_turn = self._num_search_turns
        return Search(row)

    def _due_copy(self) -> Copy | Spread | None:
        """A copy is short, so it takes no turn of chunks and steps: it happens at once."""
        for source in self._copy_sources:
            if source.is_search and not source.is_spread:
                return Spread(source)
            targets = tuple(
                row
                for row in self._running
                if not row.is_prefilled and row.shares_prompt_with(source)
            )
            if targets:
                return Copy(source, targets)
        return None
