"""Places that were read and wait for the head: which of them are measured together.

Where a request compares several versions of the model, a place is one of each: it waits here until
its text has been read under all of them, and then they go through the head together. So of the
distributions that are compared, no more are ever there than one call of the head makes::

    add(version 0), add(version 1), ...    in any order, chunk by chunk
    pop_together() -> groups of no more places and tokens than the head takes
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from model.score_slots import HEAD_PAIRS, AskedPlace, Residual
from service.worker.score_line import Asked, TargetToken
from service.worker.score_request import ScoreRequest

# Chunks that a place whose request was read to its end waits for company at the head.
_MAX_CHUNKS_WAITED = 2


@dataclass(frozen=True, slots=True)
class WaitingPlace:
    """A place that was read under every version of its request, and not measured yet.

    Attributes:
        request: Whose it is.
        tokens: That are asked about there, or some of them.
        residuals: One of each version.
        read_at: The number of the chunk that was the last of these.
    """

    request: ScoreRequest
    tokens: tuple[TargetToken, ...]
    residuals: tuple[Residual, ...]
    read_at: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Each once, though several targets may begin with it."""
        return tuple(dict.fromkeys(token.token_id for token in self.tokens))

    def asked(self, first_row: int) -> Iterator[AskedPlace]:
        """What the head is asked of it, if it stands there from ``first_row`` on."""
        for version, residual in enumerate(self.residuals):
            yield AskedPlace(
                residual,
                self.token_ids,
                self.request.num_top,
                self.request.wants_logits,
                compared_with=first_row if version else None,
            )


@dataclass(slots=True)
class WaitingPlaces:
    """All that wait, in the order in which they were read.

    Attributes:
        full_rows: With so many the head waits for no more.
    """

    full_rows: int
    _waiting: deque[WaitingPlace] = field(default_factory=deque)
    _num_rows: int = 0
    # Request and place -> version -> its residual, while some are missing.
    _incomplete: dict[str, dict[Asked, dict[int, Residual]]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Those that can be measured now."""
        return len(self._waiting)

    def add(
        self,
        request: ScoreRequest,
        version: int,
        asked: Asked,
        residual: Residual,
        *,
        read_at: int,
    ) -> None:
        """A place was read under one version."""
        incomplete = self._incomplete.setdefault(request.request_id, {})
        residuals = incomplete.setdefault(asked, {})
        residuals[version] = residual
        if len(residuals) < request.num_versions:
            return
        del incomplete[asked]
        request.note_read(asked)
        in_order = tuple(residuals[each] for each in range(request.num_versions))
        # With several versions the first tokens of many targets are too many for one call.
        most = HEAD_PAIRS // request.num_versions
        for first in range(0, len(asked.tokens), most):
            tokens = asked.tokens[first : first + most]
            self._waiting.append(WaitingPlace(request, tokens, in_order, read_at))
            self._num_rows += request.num_versions

    def are_due(self, num_chunks: int, *, is_more_coming: bool) -> bool:
        """Whether the head should not be kept waiting for company, ``num_chunks`` being read."""
        if not self._waiting:
            return False
        if self._num_rows >= self.full_rows or not is_more_coming:
            return True
        # Where more of its request is to be read, nobody has the answer any sooner.
        return any(
            each.request.is_read and num_chunks - each.read_at >= _MAX_CHUNKS_WAITED
            for each in self._waiting
        )

    def pop_together(self, most_rows: int) -> list[WaitingPlace]:
        """Those that waited longest, of at most so many rows; at least one."""
        popped: list[WaitingPlace] = []
        num_rows = num_pairs = 0
        while self._waiting:
            place = self._waiting[0]
            num_rows += len(place.residuals)
            num_pairs += len(place.residuals) * len(place.token_ids)
            if popped and (num_rows > most_rows or num_pairs > HEAD_PAIRS):
                break
            popped.append(self._waiting.popleft())
            self._num_rows -= len(place.residuals)
        return popped

    def remove(self, request: ScoreRequest) -> None:
        """Nothing of it is to be measured any more."""
        self._incomplete.pop(request.request_id, None)
        self._waiting = deque(each for each in self._waiting if each.request is not request)
        self._num_rows = sum(len(each.residuals) for each in self._waiting)
