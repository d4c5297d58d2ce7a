"""POST /generate: its fields, its answer, and the events of a stream.

StartEvent, TokenEvent*, DoneEvent  |  StartEvent, TokenEvent*, an exception
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias, TypedDict

from pydantic import AwareDatetime

from service.client.call import EVENT_STREAM, Answer, Call, check_names, read, to_json
from service.client.errors import ConnectionLost, GemmaError, error_of_event
from service.client.event_stream import Event, EventReader
from service.client.residual_stream import Intervention
from service.client.tokens import TokenLogprob

# A text, several, the token ids of one prompt, or several of those.
Prompt: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
SamplerName: TypeAlias = Literal[
    "auto", "greedy", "top_k", "top_p", "random", "beam", "contrastive"
]
FinishReason: TypeAlias = Literal["stop", "length", "timeout", "cancelled"]


class GenerateFields(TypedDict, total=False):
    """What may be said beside the prompt; ranges and defaults are the service's."""

    model: str | None
    max_tokens: int
    max_length: int | None
    echo: bool
    min_tokens: int
    sampler: SamplerName
    num_beams: int
    contrastive_alpha: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | Mapping[str, float]
    seed: int | None
    n: int
    logprobs: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    timeout_s: float | None
    priority: int
    interventions: Sequence[Intervention]


class Output(Answer):
    """One completion of one prompt.

    Attributes:
        prompt_index: Which prompt.
        index: Which of the prompt's ``n`` completions.
        stop_reason: The stop string or token id that ended it.
        seed: Sent alone with this seed, the prompt gives this output again.
    """

    prompt_index: int
    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    seed: int
    logprobs: list[TokenLogprob] | None


class Usage(Answer):
    """Tokens; those of a prompt that were cached were not read again."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Timings(Answer):
    """Seconds from arrival: to a slot, to the first token, to the last."""

    queue_s: float
    ttft_s: float | None
    total_s: float


class Generation(Answer):
    """A whole answer: ``n`` outputs for each prompt, in order."""

    id: str
    model: str
    created: AwareDatetime
    outputs: list[Output]
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """Of the only output."""
        if len(self.outputs) != 1:
            raise ValueError(f"There are {len(self.outputs)} outputs; read the text of each.")
        return self.outputs[0].text


class StartEvent(Answer):
    """The request was taken.

    Attributes:
        id: For `GemmaClient.cancel`.
        prompt_tokens: How many each prompt has.
        seeds: Of each output.
    """

    id: str
    model: str
    prompt_tokens: list[int]
    seeds: list[int]


class TokenEvent(Answer):
    """News of one output: what came since the event before, often one token."""

    prompt_index: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None


class OutputEnd(Answer):
    """How one output ended."""

    prompt_index: int
    index: int
    finish_reason: FinishReason
    stop_reason: str | int | None


class DoneEvent(Answer):
    """All outputs have ended."""

    outputs: list[OutputEnd]
    usage: Usage
    timings: Timings


GenerationEvent: TypeAlias = StartEvent | TokenEvent | DoneEvent


def generate_call(prompt: Prompt, fields: GenerateFields, request_id: str | None = None) -> Call:
    """A generation that is answered whole."""
    check_names(fields, GenerateFields, "generate")
    body = to_json({"prompt": prompt, **fields})
    return Call("POST", "/generate", body, request_id=request_id)


def stream_call(prompt: Prompt, fields: GenerateFields) -> Call:
    """A generation that is answered as events."""
    check_names(fields, GenerateFields, "stream")
    body = to_json({"prompt": prompt, **fields, "stream": True})
    return Call("POST", "/generate", body, accept=EVENT_STREAM)


class GenerationReader:
    """Bytes of a streamed answer to typed events.

    Attributes:
        start: The first event, once it has come.
        done: The last one, once it has come.
        num_tokens: How many have come so far, of all outputs together.
    """

    def __init__(self) -> None:
        self._events = EventReader()
        self.start: StartEvent | None = None
        self.done: DoneEvent | None = None
        self.num_tokens = 0

    def feed(self, piece: bytes) -> Iterator[GenerationEvent]:
        """The events that end in ``piece``; one of an unknown name is skipped.

        Raises:
            ServiceError: The service ends the stream with an error.
        """
        for event in self._events.feed(piece):
            if (typed := self._typed(event)) is not None:
                yield typed

    def _typed(self, event: Event) -> GenerationEvent | None:
        match event.name:
            case "start":
                self.start = read(StartEvent, event.data)
                return self.start
            case "token":
                token = read(TokenEvent, event.data)
                self.num_tokens += len(token.token_ids)
                return token
            case "done":
                self.done = read(DoneEvent, event.data)
                return self.done
            case "error":
                raise error_of_event(event.data)
            case _:
                return None

    def text(self, event: GenerationEvent) -> str:
        """What the event adds to the text of the only output."""
        if self.start is not None and len(self.start.seeds) != 1:
            raise ValueError(f"There are {len(self.start.seeds)} outputs; read the events of each.")
        return event.text if isinstance(event, TokenEvent) else ""

    def end(self, broken: GemmaError | None = None) -> None:
        """To be called when no more bytes come, with what has ``broken`` off, if anything.

        Raises:
            ConnectionLost: The last event is missing.
        """
        if self.done is not None:
            return
        why = "It ended without its last event." if broken is None else str(broken)
        detail = f"The stream broke off after {self.num_tokens} tokens. {why}"
        raise ConnectionLost(detail, self.num_tokens) from broken
