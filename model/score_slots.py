"""Scores in plain Python: what `model.slots.Engine` takes and gives for them.

A text is read as a prompt is prefilled, in chunks into a slot, and the residual stream after the
last block is taken where a token is asked about. Several continuations of one context follow it in
the same slot, one after another: each stands where the one before stood, and sees only the
context::

    slot 0:   context 0..299 | continuation a 300..303
                             | continuation b 300..301

    read([context 0..255]), read([context 256..299, a, b])     yields residuals
    measure([residual at 299: first tokens of a and b, ...])   yields log-probabilities

`SCORE_SLOTS` slots are for this alone. A text that is read in one call needs its slot no longer, so
the next text of the same call may have it too.

Only the standard library is imported here, as in `model.slots`.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from model.intervention_slots import Capture, Touch
from model.progress import Progress
from model.search_slots import SearchEngine
from model.slots import EngineOptions

# Texts that may be half read at once.
SCORE_SLOTS = 3
# Pairs of a place and a token that are measured together.
HEAD_PAIRS = 96

# The residual stream at one place; what it is, only the engine knows.
Residual = Any


@dataclass(frozen=True, slots=True)
class ScoreChunk:
    """Consecutive tokens of a text; they do not cross a multiple of ``EngineInfo.chunk_tokens``.

    Attributes:
        slot: Below `SCORE_SLOTS`; holds all tokens before ``start``.
        token_ids: Of the chunk.
        start: Position of the first.
        wanted: Places in the chunk whose residuals are wanted, ascending.
        touches: Of the request, in order.
        captures: What is captured, after these.
        adapter: Slot of its adapter; 0 is the base.
    """

    slot: int
    token_ids: Sequence[int]
    start: int
    wanted: tuple[int, ...] = ()
    touches: tuple[Touch, ...] = ()
    captures: tuple[Capture, ...] = ()
    adapter: int = 0


@dataclass(frozen=True, slots=True)
class AskedPlace:
    """What is asked about the token behind one place.

    Attributes:
        residual: As it was read.
        token_ids: Whose log-probabilities are wanted, at least one.
        num_top: Alternatives that are wanted, at most `model.slots.MAX_LOGPROBS`.
        wants_logits: Whether all of its logits are.
        compared_with: An earlier place of the same call whose distribution is compared with this.
    """

    residual: Residual
    token_ids: tuple[int, ...]
    num_top: int = 0
    wants_logits: bool = False
    compared_with: int | None = None


@dataclass(frozen=True, slots=True)
class PlaceScore:
    """The answer, under the model's own distribution.

    Attributes:
        logprobs: Of each token that was asked about.
        ranks: How many tokens come before it: likelier ones, and as likely ones of a lower id.
        top: The likeliest (id, logprob) pairs, best first.
        is_finite: False if the logits held NaN or infinity; nothing else is valid then.
        logits: One for each token of the vocabulary, if they were wanted: float32, little-endian.
        divergence: Kullback–Leibler divergence of that of the place that it is compared with from
            this one, in nats: KL(that place ‖ this one).
    """

    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]
    top: tuple[tuple[int, float], ...] = ()
    is_finite: bool = True
    logits: bytes = b""
    divergence: float | None = None


@runtime_checkable
class ScoreEngine(SearchEngine, Protocol):
    """An engine that also scores."""

    def read(self, chunks: Sequence[ScoreChunk]) -> Generator[None, None, list[Residual]]:
        """Reads a chunk, or several of ``info.packed_tokens`` together, as `prefill` does.

        Returns what is wanted, chunk by chunk: residuals, and then one
        `model.intervention_slots.Captured` for each capture.
        """

    def measure(self, places: Sequence[AskedPlace]) -> list[PlaceScore]:
        """Takes ``info.head_places`` with `HEAD_PAIRS` tokens in all, at most."""


ScoreEngineLoader = Callable[[EngineOptions, Progress], ScoreEngine]
