"""Where interventions act, and what is captured: checked, and in the model's types.

Positions are counted in the text as the model reads it, ``<bos>`` being 0. A text has a context and
a target: of a generation the prompt and the completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model.intervention_slots import EMBEDDING_LAYER, Intervention, StepIntervention, Touch
from model.slots import EngineInfo
from service.protocol import messages as protocol
from service.protocol.messages import Positions

# Of all that one answer captures, as float16 or float32.
MAX_CAPTURE_BYTES = 8 * 1024 * 1024
# With logits, which are float32.
MAX_TENSOR_BYTES = 16 * 1024 * 1024


class InvalidPlace(Exception):
    """Something that the model does not have, and where in the request it is named."""

    def __init__(self, detail: str, pointer: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer


@dataclass(frozen=True, slots=True)
class TextPlaces:
    """A text: how many tokens it has, and which of them are its target, ascending."""

    num_tokens: int
    target: range | tuple[int, ...]

    @property
    def context(self) -> range | tuple[int, ...]:
        """All others."""
        if isinstance(self.target, range) and self.target.stop == self.num_tokens:
            return range(self.target.start)
        target = frozenset(self.target)
        return tuple(place for place in range(self.num_tokens) if place not in target)


def check_interventions(interventions: Sequence[protocol.Intervention], info: EngineInfo) -> None:
    """Raises `InvalidPlace` for a layer or a width that the model does not have."""
    for number, each in enumerate(interventions):
        pointer = f"/interventions/{number}"
        check_layers(each.layers, info, pointer)
        if each.vector and len(each.vector) != 4 * info.hidden_dim:
            detail = (
                f"Has {len(each.vector) // 4} numbers; the residual stream has {info.hidden_dim}."
            )
            raise InvalidPlace(detail, f"{pointer}/vector")


def check_layers(layers: Sequence[int], info: EngineInfo, pointer: str) -> None:
    for place, layer in enumerate(layers):
        if not EMBEDDING_LAYER <= layer < info.num_layers:
            detail = f"Must be in [{EMBEDDING_LAYER}, {info.num_layers}), the layers of the model."
            raise InvalidPlace(detail, f"{pointer}/layers/{place}")


def places_of(positions: Positions, text: TextPlaces, pointer: str) -> range | tuple[int, ...]:
    """Which tokens of a text are meant, ascending.

    Raises:
        InvalidPlace: One that is listed is not there.
    """
    match positions:
        case "all":
            return range(text.num_tokens)
        case "context":
            return text.context
        case "target":
            return text.target
        case "last":
            return range(text.num_tokens - 1, text.num_tokens)
        case _:
            for place, position in enumerate(positions):
                if not 0 <= position < text.num_tokens:
                    detail = f"Must be in [0, {text.num_tokens}), the tokens of every text."
                    raise InvalidPlace(detail, f"{pointer}/positions/{place}")
            return tuple(sorted(positions))


def places_between(places: range | tuple[int, ...], start: int, end: int) -> tuple[int, ...]:
    """Those from ``start`` to ``end``, counted from ``start``."""
    if isinstance(places, range):
        return tuple(range(max(places.start, start) - start, min(places.stop, end) - start))
    return tuple(place - start for place in places if start <= place < end)


def intervention_of(given: protocol.Intervention) -> Intervention:
    return Intervention(given.operation, given.layers, given.scale, given.vector)


@dataclass(frozen=True, slots=True)
class PromptInterventions:
    """Those of one prompt, and of what is drawn behind it.

    Attributes:
        in_prompt: Each with the positions of the prompt at which it acts.
        steps: Each while tokens are drawn.
    """

    in_prompt: tuple[tuple[Intervention, range | tuple[int, ...]], ...] = ()
    steps: tuple[StepIntervention, ...] = ()

    def touches(self, start: int, end: int) -> tuple[Touch, ...]:
        """In the chunk from ``start`` to ``end``."""
        found = (
            Touch(each, places_between(positions, start, end)) for each, positions in self.in_prompt
        )
        return tuple(touch for touch in found if touch.places)

    def due(self, position: int, num_prompt: int) -> tuple[Intervention, ...]:
        """On the newest token of a step, which stands at this position."""
        return tuple(each.intervention for each in self.steps if each.acts_at(position, num_prompt))


NO_INTERVENTIONS = PromptInterventions()


def prompt_interventions(
    given: Sequence[protocol.Intervention], num_prompt: int
) -> PromptInterventions:
    """Where interventions act for a prompt of so many tokens.

    Raises:
        InvalidPlace: A position is not in it.
    """
    if not given:
        return NO_INTERVENTIONS
    # The last token of the prompt is the newest one when the first is drawn.
    text = TextPlaces(num_prompt, range(num_prompt, num_prompt))
    in_prompt, steps = [], []
    for number, each in enumerate(given):
        intervention = intervention_of(each)
        positions = places_of(each.positions, text, f"/interventions/{number}")
        at_prompt_end = num_prompt - 1 in positions
        at_completion = each.positions in ("all", "target", "last")
        steps.append(StepIntervention(intervention, at_prompt_end, at_completion))
        in_prompt.append((intervention, positions))
    return PromptInterventions(tuple(in_prompt), tuple(steps))
