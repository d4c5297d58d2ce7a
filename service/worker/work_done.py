"""How many tokens were computed for requests, and how many only to fill up a shape."""

from collections.abc import Mapping, Sequence

from service.protocol.worker_counts import WorkCounts


class WorkDone:
    """Counts since the worker started.

    Args:
        buckets: Row counts of decode programs (``decode_rows``) and lengths of prefill programs
            (``prefill_tokens``); where one is missing nothing is filled up.
    """

    def __init__(self, buckets: Mapping[str, Sequence[int]]) -> None:
        self._row_buckets = buckets.get("decode_rows", ())
        self._chunk_buckets = buckets.get("prefill_tokens", ())
        self._prefill = self._prefill_padding = self._decode = self._decode_padding = 0
        self._score = self._score_padding = 0
        self._train = self._train_padding = 0

    @property
    def counts(self) -> WorkCounts:
        """So far."""
        return WorkCounts(
            self._prefill,
            self._prefill_padding,
            self._decode,
            self._decode_padding,
            self._score,
            self._score_padding,
            self._train,
            self._train_padding,
        )

    def note_prefill(self, num_tokens: int) -> None:
        """A chunk."""
        self._prefill += num_tokens
        self._prefill_padding += _missing(num_tokens, self._chunk_buckets)

    def note_join(self, num_tokens: int, num_rows: int) -> None:
        """A chunk and a step of rows in one: nothing fills it up."""
        self._prefill += num_tokens
        self._decode += num_rows

    def note_score(self, num_tokens: int) -> None:
        """A chunk of texts that are scored."""
        self._score += num_tokens
        self._score_padding += _missing(num_tokens, self._chunk_buckets)

    def note_attribution(self, num_tokens: int, num_padding: int) -> None:
        """A text that is attributed, each of the times that it goes through the model."""
        self._score += num_tokens
        self._score_padding += num_padding

    def note_training(self, num_tokens: int, num_padding: int) -> None:
        """A step of a job."""
        self._train += num_tokens
        self._train_padding += num_padding

    def note_decode(self, num_rows: int, num_steps: int) -> None:
        """A dispatch; rows that end before its last step count as padding nowhere."""
        largest = max(self._row_buckets, default=num_rows)
        num_left = num_rows % largest
        self._decode += num_rows * num_steps
        if num_left:
            self._decode_padding += _missing(num_left, self._row_buckets) * num_steps


def _missing(count: int, buckets: Sequence[int]) -> int:
    """What fills ``count`` up to the next bucket."""
    return next((bucket for bucket in sorted(buckets) if bucket >= count), count) - count
