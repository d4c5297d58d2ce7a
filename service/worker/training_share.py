"""How much of the time is for training while others are served.

Training has a share of all time that somebody else wants too. What the others take earns it time,
which it spends when its turn comes; what nobody else wants costs it nothing. So it gets its share
whatever kind of work the others do, and no more than a moment can be saved up.
"""

# What may be earned or owed at most, so that a burst of one kind is not paid for long after.
_MOST_SECONDS = 0.5


class TrainingShare:
    """Earned time.

    Attributes:
        per_other: Seconds that are earned in a second of others.

    Args:
        share: Of all time, from 0, only what nobody else wants, to less than 1.
    """

    def __init__(self, share: float) -> None:
        assert 0.0 <= share < 1.0, "others have some too"
        self.per_other = share / (1.0 - share)
        self._earned_seconds = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is training's turn, before others."""
        return self._earned_seconds > 0.0

    @property
    def earned_seconds(self) -> float:
        """What may be spent now."""
        return max(self._earned_seconds, 0.0)

    def note_others(self, seconds: float) -> None:
        """Others worked while training waited."""
        self._add(seconds * self.per_other)

    def note_training(self, seconds: float) -> None:
        """It trained while others waited."""
        self._add(-seconds)

    def _add(self, seconds: float) -> None:
        earned = self._earned_seconds + seconds
        self._earned_seconds = min(max(earned, -_MOST_SECONDS), _MOST_SECONDS)
