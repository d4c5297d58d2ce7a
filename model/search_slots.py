"""Searches over several slots, in plain Python: what `model.slots.Engine` takes and gives for them.

Beam search follows several continuations of one prompt side by side, each in a slot of its own::

    prefill(slot 0), copy(slot 0 to the others)
    step_beams([beam in slot 0: token n-1])        yields the likeliest first tokens
    step_beams([beam in each slot: its token n])   yields the likeliest continuations of all

A beam goes on in any of the slots; the engine says which, and copies what is missing there. Nobody
else may decode in them meanwhile.

Contrastive search follows one continuation and tries several tokens for its next place, one in each
slot. All slots hold the same tokens before that place, and the engine keeps the directions of their
hidden states::

    keep_hidden(slot 0), prefill(slot 0), copy(slot 0 to the others)
    step_candidates(token n-1, in every slot)      yields the candidates for place n
    step_candidates(candidates for n)              chooses one; yields the candidates for n+1
    drop_hidden(slot 0)

Only the standard library is imported here, as in `model.slots`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from model.intervention_slots import Intervention
from model.slots import Engine, SampledToken

# Of beams, and of candidates.
MAX_WIDTH = 8


@dataclass(frozen=True, slots=True)
class SearchRules:
    """What changes the likelihoods of a search, and what is told about its tokens.

    Attributes:
        banned_ids: At most `model.slots.MAX_STOP_IDS` ids that must not come at this step.
        logit_bias: At most `model.slots.MAX_BIASES` pairs of id and bias.
        num_logprobs: None, or how many alternatives come with each token.
        interventions: In the newest token of each row, at this step.
    """

    banned_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None
    interventions: tuple[Intervention, ...] = ()


@dataclass(frozen=True, slots=True)
class Beam:
    """One of the continuations that are followed.

    Attributes:
        slot: Holds the tokens before ``token_id``; of no meaning once the beam is done.
        token_id: Its newest token.
        logprob: Of all its tokens together, each after those before it.
        is_done: It keeps its tokens and its log-probability, and competes with them.
    """

    slot: int
    token_id: int
    logprob: float
    is_done: bool = False


@dataclass(frozen=True, slots=True)
class BeamStep:
    """One step of a beam search.

    Attributes:
        slots: All that the search holds, 2 to `MAX_WIDTH`.
        beams: One for each slot, or at first a single one.
        position: Of the newest token of every beam that is not done.
        num_shared_tokens: So many first tokens are the same in all slots.
        rules: Of the request, at this step.
        adapter: Slot of its adapter; 0 is the base.
    """

    slots: tuple[int, ...]
    beams: tuple[Beam, ...]
    position: int
    num_shared_tokens: int
    rules: SearchRules
    adapter: int = 0


@dataclass(frozen=True, slots=True)
class Extension:
    """A beam after a step.

    Attributes:
        source: Which beam of the step it continues.
        beam: With its new token and slot.
        token: The new token; None for a beam that was done.
    """

    source: int
    beam: Beam
    token: SampledToken | None


@dataclass(frozen=True, slots=True)
class CandidateStep:
    """One step of a contrastive search.

    Attributes:
        slots: One for each candidate, 2 to `MAX_WIDTH`; the first is that of `keep_hidden`.
        token_ids: The candidates, all of them the last prompt token at first.
        probabilities: Of the candidates.
        position: Where they are tried.
        alpha: Weight of what is new against what is likely, 0 to 1.
        rules: Of the request, for the candidates that come next.
        adapter: Slot of its adapter; 0 is the base.
    """

    slots: tuple[int, ...]
    token_ids: tuple[int, ...]
    probabilities: tuple[float, ...]
    position: int
    alpha: float
    rules: SearchRules
    adapter: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """What a step of a contrastive search yields.

    Attributes:
        place: Of the chosen one among the candidates; all slots hold it now.
        candidates: For the place after it, likeliest first.
        probabilities: Of these candidates.
    """

    place: int
    candidates: tuple[SampledToken, ...]
    probabilities: tuple[float, ...]


@runtime_checkable
class SearchEngine(Engine, Protocol):
    """An engine that searches. ``info.num_slots`` bounds the slots of a search."""

    def keep_hidden(self, slot: int) -> None:
        """Keeps the hidden states of this slot's next prompt: all of it is prefilled after this."""

    def drop_hidden(self, slot: int) -> None:
        """Frees them, if there are any."""

    def step_beams(self, step: BeamStep) -> list[Extension]:
        """The likeliest continuations, best first, one for each slot.

        None at all if the logits of a beam held NaN or infinity.
        """

    def step_candidates(self, step: CandidateStep) -> Choice | None:
        """The best of the candidates; None if the logits of one held NaN or infinity."""
