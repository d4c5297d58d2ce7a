"""How long-running work tells its caller how far it is."""

from typing import Protocol, runtime_checkable


# Checkable because the tests execute every annotation.
@runtime_checkable
class Progress(Protocol):
    """Called from the thread that does the work, often; must return at once and not raise.

    ``phase`` is "download", "convert", "load" or "compile"; ``done`` and ``total`` are bytes or
    counts, the same unit throughout one phase. The last call of a phase has ``done == total``.
    """

    def __call__(self, phase: str, done: float, total: float) -> None: ...


def no_progress(phase: str, done: float, total: float) -> None:
    """A `Progress` that nobody watches."""
