"""What a request asks of attribution, as questions for the engine, one for each input."""

from collections.abc import Sequence
from dataclasses import dataclass

from model.attribution_questions import (
    MAX_ATTRIBUTION_TOKENS,
    AttributedText,
    Attribution,
    AttributionQuestion,
)
from model.intervention_slots import Touch
from model.slots import EngineInfo
from service.protocol.messages import Attribute, Score, ScoredContext, ScoredText
from service.worker.actions import RowKey
from service.worker.interventions import intervention_of, places_between
from service.worker.score_inputs import InvalidInput, PlannedInput, PlannedTarget

# Tokens of all texts of a request, times steps: the longest text with all steps.
MAX_ATTRIBUTION_WORK = 32_768
# All numbers of all inputs, if they are told.
MAX_TENSOR_BYTES = 8 * 1024 * 1024


@dataclass(slots=True, eq=False)
class AttributionJob:
    """One input's question on its way to an answer.

    Attributes:
        key: Its request, and its number there, behind those of the passages.
        question: For the engine.
        tenant: Whose it is.
        priority: Higher ones are begun first.
        answer: Set when it is done.
    """

    key: RowKey
    question: AttributionQuestion
    tenant: str = "default"
    priority: int = 0
    answer: Attribution | None = None

    @property
    def cost_tokens(self) -> int:
        """Tokens that go through the model and back for it."""
        return self.question.cost_tokens


def attribution_questions(
    command: Score, inputs: Sequence[PlannedInput], info: EngineInfo
) -> list[AttributionQuestion]:
    """One for each input, in order; none if the request does not ask for attribution.

    Raises:
        InvalidInput: One cannot be answered.
    """
    asked = command.attribution
    if asked is None:
        return []
    if any(command.versions):
        detail = "Attribution is of the base model alone; leave adapters out."
        raise InvalidInput("invalid_field", detail, "/attribution")
    if not -1 <= asked.layer < info.num_layers:
        detail = f"Must be in [-1, {info.num_layers - 1}]."
        raise InvalidInput("invalid_field", detail, "/attribution/layer")
    questions = []
    for index, planned in enumerate(inputs):
        chosen = _chosen(asked, index, planned)
        for number in chosen:
            _check_length(command, index, number, planned.targets[number])
        questions.append(_question(command, planned, [planned.targets[each] for each in chosen]))
    _check_work(asked, questions, info)
    return questions


def _chosen(asked: Attribute, index: int, planned: PlannedInput) -> range:
    """The numbers of the targets that are meant."""
    count = len(planned.targets)
    if asked.target is None:
        return range(count)
    if asked.target >= count:
        detail = f"Input {index} has no such target: it has {count}, counted from 0."
        raise InvalidInput("invalid_field", detail, "/attribution/target")
    return range(asked.target, asked.target + 1)


def _check_length(command: Score, index: int, number: int, target: PlannedTarget) -> None:
    num_tokens = len(target.text_ids)
    if num_tokens <= MAX_ATTRIBUTION_TOKENS:
        return
    match command.inputs[index]:
        case ScoredText():
            place = "text"
        case ScoredContext():
            place = f"targets/{number}"
        case _:
            place = "token_ids"
    detail = (
        f"The text has {num_tokens} tokens; attribution takes at most {MAX_ATTRIBUTION_TOKENS}."
    )
    raise InvalidInput("invalid_field", detail, f"/inputs/{index}/{place}")


def _question(
    command: Score, planned: PlannedInput, targets: Sequence[PlannedTarget]
) -> AttributionQuestion:
    asked = command.attribution
    assert asked is not None, "somebody asks"
    texts = tuple(_text(command, target) for target in targets)
    first = texts[0].token_ids
    num_told = len(first)
    if len(texts) > 1:
        # What is told belongs to all of them: the context, as far as each leaves it as it is.
        num_told = planned.num_prompt_tokens
        for text in texts[1:]:
            while text.token_ids[:num_told] != first[:num_told]:
                num_told -= 1
    return AttributionQuestion(
        texts, num_told, asked.layer, asked.num_steps, asked.target is None, asked.reduction
    )


def _text(command: Score, target: PlannedTarget) -> AttributedText:
    pairs = zip(target.positions, target.token_ids, strict=True)
    asked = tuple((position - 1, token_id) for position, token_id in pairs)
    # On what stands behind the last place that is asked about nothing depends.
    num_read = max(place for place, _ in asked) + 1
    touches = tuple(
        Touch(intervention_of(each), places_between(places, 0, num_read))
        for each, places in zip(command.interventions, target.touched, strict=True)
    )
    return AttributedText(target.text_ids, asked, touches)


def _check_work(
    asked: Attribute, questions: Sequence[AttributionQuestion], info: EngineInfo
) -> None:
    work = sum(question.cost_tokens for question in questions)
    if work > MAX_ATTRIBUTION_WORK:
        detail = (
            f"{work} tokens, once for each step, are more than the {MAX_ATTRIBUTION_WORK} that a "
            "request may attribute. Lower steps or send fewer inputs."
        )
        raise InvalidInput("invalid_field", detail, "/attribution")
    num_bytes = sum(question.num_told for question in questions) * info.hidden_dim * 4
    if asked.reduction == "none" and num_bytes > MAX_TENSOR_BYTES:
        detail = (
            f"All numbers are {num_bytes} bytes; an answer may hold {MAX_TENSOR_BYTES}. Use "
            "another reduce or send fewer inputs."
        )
        raise InvalidInput("invalid_field", detail, "/attribution/reduce")
