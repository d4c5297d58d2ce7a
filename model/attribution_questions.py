"""Attribution in plain Python: what `model.slots.Engine` takes and gives for it.

A question names texts, and for each the log-probabilities behind some of its places. Their sum is a
number; the answer tells how it depends on the residual stream at one layer, token by token. There
are two ways:

* the gradient: its derivative there;
* integrated gradients: the stream is moved on a straight line from zero to where it is, and the
  derivative along the way is summed. So the parts of all tokens add up to what the number changes
  between the two ends, but for the error of the sum, which is told.

Source: Sundararajan, Taly and Yan 2017, https://arxiv.org/abs/1703.01365.

Only the standard library is imported here, as in `model.slots`.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from model.intervention_slots import Touch
from model.progress import Progress
from model.score_slots import ScoreEngine
from model.slots import EngineOptions

Reduction = Literal["none", "dot_input", "l2"]

# Tokens that one pass through the model holds; the larger one is the longest text.
PASS_TOKENS = (128, 512)
MAX_ATTRIBUTION_TOKENS = PASS_TOKENS[-1]
# Points on the line of integrated gradients.
MAX_ATTRIBUTION_STEPS = 64


@dataclass(frozen=True, slots=True)
class AttributedText:
    """Token ids, and what is asked about them.

    Attributes:
        token_ids: Of the text.
        asked: (place, token id) pairs: the log-probability of a token behind a place.
        touches: Interventions in it, in order. What is told is of the model that they make: of the
            stream at a layer after those that act there.
    """

    token_ids: tuple[int, ...]
    asked: tuple[tuple[int, int], ...]
    touches: tuple[Touch, ...] = ()

    @property
    def num_read(self) -> int:
        """Tokens up to the last place; on what stands behind it nothing depends."""
        return max(place for place, _ in self.asked) + 1


@dataclass(frozen=True, slots=True)
class AttributionQuestion:
    """What is asked.

    Attributes:
        texts: At least one, of at most `MAX_ATTRIBUTION_TOKENS` tokens each.
        num_told: Leading tokens that all texts share, which are told.
        layer: −1 for the embeddings before scaling, or the block whose output it is.
        num_steps: Of integrated gradients, at most `MAX_ATTRIBUTION_STEPS`; 0 for the gradient.
        is_loss: Whether the number is the negative sum.
        reduction: ``none`` tells all numbers of a token; ``dot_input`` the sum of them, of the
            gradient each times the stream; ``l2`` their norm.
    """

    texts: tuple[AttributedText, ...]
    num_told: int
    layer: int
    num_steps: int = 0
    is_loss: bool = False
    reduction: Reduction = "dot_input"

    @property
    def cost_tokens(self) -> int:
        """Tokens that go through the model and back."""
        return max(self.num_steps, 1) * sum(text.num_read for text in self.texts)


@dataclass(frozen=True, slots=True)
class Attribution:
    """The answer.

    Attributes:
        numbers: One for each token that is told, or with ``none`` all of them, token by token:
            float32, little-endian.
        completeness_error: Of integrated gradients: how far the sum over all tokens is from what
            the number changes between zero and the stream, divided by that change.
        is_finite: False if something was NaN or infinite; nothing else is valid then.
    """

    numbers: bytes
    completeness_error: float | None = None
    is_finite: bool = True


class Pass(NamedTuple):
    """So many copies of a text lie one behind the other in so many tokens."""

    num_tokens: int
    num_rows: int


def passes(num_read: int, num_rows: int) -> list[Pass]:
    """How ``num_rows`` copies of a text are shared out; a function of these two numbers alone.

    The length that computes the fewest tokens, the shorter one if both do.
    """
    fitting = [size for size in PASS_TOKENS if size >= num_read]

    def num_passes(size: int) -> int:
        return -(-num_rows // (size // num_read))

    size = min(fitting, key=lambda size: (num_passes(size) * size, size))
    most = size // num_read
    return [Pass(size, min(most, num_rows - first)) for first in range(0, num_rows, most)]


def num_padding_tokens(question: AttributionQuestion) -> int:
    """Tokens that only fill up the passes whose derivatives are taken."""
    return sum(
        size.num_tokens - size.num_rows * text.num_read
        for text in question.texts
        for size in passes(text.num_read, max(question.num_steps, 1))
    )


@runtime_checkable
class AttributionEngine(ScoreEngine, Protocol):
    """An engine that also attributes."""

    def attribute(self, question: AttributionQuestion) -> Generator[bool, None, Attribution]:
        """Answers; pauses after each part of the work, and says whether it ended a pass.

        Between two passes it holds the derivatives so far, and nothing on the device.
        """


AttributionEngineLoader = Callable[[EngineOptions, Progress], AttributionEngine]
