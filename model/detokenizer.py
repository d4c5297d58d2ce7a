"""Token ids, one at a time, to text that is safe to send.

A character of several bytes may be spread over several tokens, and a stop string over several
characters. What is released never has to be taken back: it ends at a whole character, and before
anything that may still turn out to be the beginning of a stop string.

    add(id) -> released text     ...     finish() -> the rest

The pieces, joined, are the whole text; that is the only way the whole text is ever made.
"""

import codecs
import copy
from collections.abc import Callable, Sequence


class StreamingDetokenizer:
    """The text of one completion.

    Args:
        piece_bytes: The bytes of a token.
        stop_strings: Each ends the text when it appears, and is cut from it.
    """

    def __init__(self, piece_bytes: Callable[[int], bytes], stop_strings: Sequence[str]) -> None:
        self._piece_bytes = piece_bytes
        self._stop_strings = tuple(stop_strings)
        self._longest_stop = max((len(stop) for stop in self._stop_strings), default=0)
        # Bytes that are no UTF-8 become U+FFFD, as in SentencePiece.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def holds_part_of_stop(self) -> bool:
        """Whether the text so far ends with what a stop string begins with."""
        return bool(self._held)

    def fork(self) -> "StreamingDetokenizer":
        """Another one that has taken in the same tokens."""
        twin = copy.copy(self)
        twin._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        twin._decoder.setstate(self._decoder.getstate())
        return twin

    def add(self, token_id: int, *, may_stop: bool = True) -> str:
        """Takes one token in; returns the text that it makes safe to send.

        Args:
            token_id: The next token.
            may_stop: False while a stop string must not end the text yet (``min_tokens``); what
                matched meanwhile is plain text for good.
        """
        assert self.stopped_by is None, "a token after the stop string"
        self._held += self._decoder.decode(self._piece_bytes(token_id))
        if not may_stop:
            return self._release(len(self._held))
        if self._cut_at_stop():
            return self._release(len(self._held))
        return self._release(len(self._held) - self._num_undecided())

    def finish(self) -> str:
        """The rest, when no token follows: unfinished characters become U+FFFD."""
        if self.stopped_by is not None:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        self._cut_at_stop()
        return self._release(len(self._held))

    def _cut_at_stop(self) -> bool:
        """Cuts the held text at the first stop string in it, if there is one.

        First is the one that ends first, as that is the one that stops when characters come one
        by one; of two that end together it is the longer. So tokens' borders never matter.
        """
        found = [(self._held.find(stop), stop) for stop in self._stop_strings if stop in self._held]
        if not found:
            return False
        at, self.stopped_by = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
        self._held = self._held[:at]
        return True

    def _num_undecided(self) -> int:
        """Characters at the end that a stop string may begin with."""
        for length in range(min(self._longest_stop, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop_strings):
                return length
        return 0

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released
