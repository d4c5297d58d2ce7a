"""What the native routes take and give. Each number has a closed range, checked here first.

Ranges that depend on the loaded model (its context, its vocabulary) are wider here than there;
the worker's admission has the last word.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.api.intervention_schemas import Interventions
from service.api.strict_model import MAX_TOKENS, StrictModel as _Model, refusal as _refusal

MAX_PROMPTS = 64
MAX_COMPLETIONS = 64
MAX_VOCABULARY = 1_048_576
MAX_STOP_BYTES = 64
# A served name, the name of an adapter, its version and what stands between them.
MAX_MODEL_NAME = 140
MAX_BIASES = 300
MAX_BIAS = 100
# Beams, and candidates of contrastive search.
MAX_SEARCH_WIDTH = 8
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_MAX_ID_DIGITS = 7
# Far above the fields of any request: bounds the work of listing the unknown ones.
MAX_FIELDS = 64


def _check_token_ids(token_ids: list[Any], location: tuple[int, ...]) -> None:
    # Three passes in C for the honest case: a body holds some 10^5 ids.
    has_only_ints = set(map(type, token_ids)) == {int}
    if has_only_ints and min(token_ids) >= 0 and max(token_ids) < MAX_VOCABULARY:
        return
    for position, token_id in enumerate(token_ids):
        # Not isinstance: a bool is an int.
        if type(token_id) is not int:
            raise _refusal((*location, position), "should be a token id")
        if not 0 <= token_id < MAX_VOCABULARY:
            raise _refusal((*location, position), f"should be in [0, {MAX_VOCABULARY})")


def _check_prompt(value: object) -> object:
    """Refuses what is no prompt, with the pointer of the first thing wrong."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _refusal((), "should be a string, or a list of strings, of token ids or of lists")
    if not value:
        raise _refusal((), "should not be empty")
    kind = type(value[0])
    if kind is int:
        _check_token_ids(value, ())
        return value
    if kind not in (str, list):
        raise _refusal((0,), "should be a string, a token id or a list of token ids")
    if len(value) > MAX_PROMPTS:
        raise _refusal((), f"should have at most {MAX_PROMPTS} prompts")
    for index, row in enumerate(value):
        if type(row) is not kind:
            raise _refusal((index,), "should be of the same kind as the first prompt")
        if row == []:
            raise _refusal((index,), "should have at least one token id")
        if isinstance(row, list):
            _check_token_ids(row, (index,))
    return value


def _check_stop_bytes(stop: str) -> str:
    if len(stop.encode()) > MAX_STOP_BYTES:
        raise PydanticCustomError("invalid_field", "should have at most 64 bytes of UTF-8")
    return stop


_TEXT_SCHEMA = {"type": "string"}
_TOKEN_IDS_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_VOCABULARY},
    "minItems": 1,
}
_PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT_SCHEMA,
        {
            "type": "array",
            "items": _TEXT_SCHEMA,
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
        },
        _TOKEN_IDS_SCHEMA,
        {
            "type": "array",
            "items": _TOKEN_IDS_SCHEMA,
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
        },
    ]
}

Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_check_prompt),
    WithJsonSchema(_PROMPT_SCHEMA),
]
ModelName = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_NAME)]
TokenId = Annotated[int, Field(ge=0, lt=MAX_VOCABULARY)]
StopString = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_STOP_BYTES),
    AfterValidator(_check_stop_bytes),
]


def _check_logit_bias(value: object) -> object:
    """Refuses what is no table of ids and biases, with the pointer of the first thing wrong."""
    if not isinstance(value, dict):
        raise _refusal((), "should be an object of token ids and biases")
    if len(value) > MAX_BIASES:
        raise _refusal((), f"should have at most {MAX_BIASES} token ids")
    for key, bias in value.items():
        if not key.isascii() or not key.isdecimal() or len(key) > _MAX_ID_DIGITS:
            raise _refusal((key[:_MAX_ID_DIGITS],), "should be a token id")
        if str(int(key)) != key or int(key) >= MAX_VOCABULARY:
            raise _refusal((key,), f"should be an id in [0, {MAX_VOCABULARY}) without zeros before")
        # Not isinstance: a bool is an int.
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise _refusal((key,), f"should be a number in [{-MAX_BIAS}, {MAX_BIAS}]")
    return {key: float(bias) for key, bias in value.items()}


LogitBias = Annotated[
    dict[str, float],
    PlainValidator(_check_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,6})$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
            "maxProperties": MAX_BIASES,
        }
    ),
]


SamplerName = Literal["auto", "greedy", "top_k", "top_p", "random", "beam", "contrastive"]
# What a request may leave as it is, and a sampler of another name makes no use of.
_UNUSED_BY = {
    "auto": (),
    "greedy": ("top_k", "top_p", "min_p"),
    "top_k": ("top_p", "min_p"),
    "top_p": ("min_p",),
    "random": ("top_k", "top_p", "min_p"),
    "beam": ("temperature", "top_k", "top_p", "min_p", *_PENALTIES),
    "contrastive": ("temperature", "top_p", "min_p", *_PENALTIES),
}


class GenerateRequest(_Model):
    """One or more prompts and how to continue them."""

    model: ModelName | None = Field(
        None,
        description="`gemma`, the base, which it is if left out; `gemma:tone`, the live version of "
        "an adapter; `gemma:tone@1`, that version.",
    )
    prompt: Prompt = Field(
        description="A text, a list of texts, the token ids of one prompt, or a list of those. "
        "`<bos>` is put in front of text, and token ids are taken as they are. "
        "At most 64 prompts, and prompts times `n` at most 64."
    )
    max_tokens: int = Field(
        128,
        ge=1,
        le=MAX_TOKENS,
        description="Most tokens of a completion. With the prompt it must fit the context.",
    )
    max_length: Annotated[int, Field(ge=2, le=MAX_TOKENS)] | None = Field(
        None,
        description="Most tokens of prompt and completion together, as Keras counts; in place of "
        "`max_tokens`.",
    )
    echo: bool = Field(False, description="Let the text begin with the prompt, as in Keras.")
    min_tokens: int = Field(
        0,
        ge=0,
        le=MAX_TOKENS,
        description="Fewest tokens of a completion before it may stop; at most `max_tokens`.",
    )
    sampler: SamplerName = Field(
        "auto",
        description="How tokens are chosen; `auto`: as the numbers below say. Any other name takes "
        "only the numbers that are its own: `greedy` none, `random` the temperature, `top_k` and "
        "`top_p` theirs too, `beam` and `contrastive` those of the next two fields.",
    )
    num_beams: int = Field(
        4,
        ge=2,
        le=MAX_SEARCH_WIDTH,
        description="Continuations that beam search follows side by side, each in a slot. It "
        "returns the `n` likeliest, best first.",
    )
    contrastive_alpha: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Contrastive search: weight of what repeats the context least against what is "
        "likeliest, among `top_k` candidates, 2 to 8.",
    )
    temperature: float = Field(
        1.0, ge=0, le=5, description="Divides the logits before drawing; 0 is greedy."
    )
    top_k: int = Field(
        0,
        ge=0,
        le=MAX_VOCABULARY,
        description="Draw from the k likeliest tokens; 0 is all of them.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Draw from the fewest likeliest tokens that hold this share of probability.",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Draw from tokens with at least this share of the likeliest's probability.",
    )
    repetition_penalty: float = Field(
        1.0,
        ge=0.1,
        le=10,
        description="Above 1, tokens of prompt and completion get less likely, and below likelier: "
        "divides their positive logits, multiplies their negative ones.",
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken from the logit of a token of the completion."
    )
    frequency_penalty: float = Field(
        0.0,
        ge=-2,
        le=2,
        description="Taken from the logit of a token for each time the completion has it.",
    )
    logit_bias: LogitBias = Field(
        default_factory=dict,
        description='Added to the logits of these token ids, after penalties: `{"1234": -5}`.',
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None,
        description="Seed of the first output; output k uses (seed + k) mod 2**32. "
        "Null: the server draws one. It is always returned.",
    )
    n: int = Field(1, ge=1, le=8, description="Completions of each prompt.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None,
        description="Alternatives to list with the log-probability of each token, under the "
        "model's own distribution. Null: no log-probabilities.",
    )
    stop: list[StopString] = Field(
        default_factory=list,
        max_length=8,
        description="Texts that end a completion, each of at most 64 bytes of UTF-8; cut from "
        "the returned text.",
    )
    stop_token_ids: list[TokenId] = Field(
        default_factory=list,
        max_length=16,
        description="Token ids that end a completion.",
    )
    ignore_eos: bool = Field(
        False, description="Go on past the model's own end tokens; `stop` still holds."
    )
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = Field(
        None,
        description="Seconds after which the request ends with what it has, `finish_reason` "
        "`timeout`; at most the server's own limit, which null means.",
    )
    priority: int = Field(
        0,
        ge=-8,
        le=8,
        description="Who waits with a higher priority gets a slot before anyone with a lower one; "
        "what runs is not interrupted.",
    )
    stream: bool = Field(False, description="Answer with server-sent events as tokens come.")
    interventions: Interventions = Field(
        default_factory=list,
        description="Changes of the residual stream, of prompts and of what is generated, in this "
        "order; at most 4.",
    )

    @model_validator(mode="before")
    @classmethod
    def _check_field_count(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise _refusal((), f"should have at most {MAX_FIELDS} fields")
        return data

    @model_validator(mode="after")
    def _check_fields_together(self) -> "GenerateRequest":
        if self.max_length is not None and "max_tokens" in self.model_fields_set:
            raise _refusal(("max_length",), "should stand in place of max_tokens, not beside it")
        if self.max_length is None and self.min_tokens > self.max_tokens:
            raise _refusal(("min_tokens",), f"should be at most max_tokens, {self.max_tokens}")
        if len(self.prompts()) * self.n > MAX_COMPLETIONS:
            raise _refusal(("n",), f"times the prompts should be at most {MAX_COMPLETIONS}")
        self._check_sampler()
        return self

    def _check_sampler(self) -> None:
        """Refuses numbers that the named sampler would contradict or make no use of."""
        for name in _UNUSED_BY[self.sampler]:
            default = type(self).model_fields[name].default
            if getattr(self, name) != default:
                detail = f"should be {default:g}: the sampler {self.sampler} makes no use of it"
                raise _refusal((name,), detail)
        for name, sampler in (("num_beams", "beam"), ("contrastive_alpha", "contrastive")):
            if name in self.model_fields_set and self.sampler != sampler:
                raise _refusal((name,), f"should be left out: only the sampler {sampler} uses it")
        match self.sampler:
            case "greedy" if "temperature" in self.model_fields_set and self.temperature > 0:
                raise _refusal(("temperature",), "should be 0 or left out: greedy draws nothing")
            case "top_k" | "top_p" | "random" if self.temperature == 0:
                detail = f"should be above 0 for {self.sampler}; for 0, use the sampler greedy"
                raise _refusal(("temperature",), detail)
        match self.sampler:
            case "top_k" if self.top_k < 1:
                raise _refusal(("top_k",), "should be at least 1 for the sampler top_k")
            case "top_p" if self.top_p >= 1:
                raise _refusal(("top_p",), "should be below 1 for the sampler top_p")
            case "contrastive" if not 2 <= self.top_k <= MAX_SEARCH_WIDTH:
                detail = f"should be in [2, {MAX_SEARCH_WIDTH}]: the candidates of contrastive"
                raise _refusal(("top_k",), detail)
            case "contrastive" if self.n > 1:
                raise _refusal(("n",), "should be 1: contrastive search has one result")
            case "beam" if self.n > self.num_beams:
                raise _refusal(("n",), f"should be at most num_beams, {self.num_beams}")

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, whichever of its four forms ``prompt`` has."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        rows: list[Any] = self.prompt
        return [rows] if type(rows[0]) is int else rows


def field_limits() -> dict[str, dict[str, float]]:
    """The closed range of every number of `GenerateRequest`, read from the schema itself."""
    bounds = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    keywords = (*bounds, "maxItems", "maxProperties")
    limits = {}
    for name, schema in GenerateRequest.model_json_schema()["properties"].items():
        variants = [schema, *schema.get("anyOf", [])] if name != "prompt" else []
        found = {key: part[key] for part in variants for key in keywords if key in part}
        if found:
            limits[name] = found
    return limits


class TopLogprob(_Model):
    """A token that could have stood in this place."""

    id: int
    token: str = Field(description="The token as text; may be a part of a character.")
    bytes: list[int] = Field(description="The token's UTF-8 bytes.")
    logprob: float = Field(description="Natural logarithm, under the model's own distribution.")


class TokenLogprob(TopLogprob):
    """A token of the completion, with the likeliest ones in its place."""

    top: list[TopLogprob]


class Output(_Model):
    """One completion of one prompt."""

    prompt_index: int
    index: int = Field(description="Which of the prompt's `n` completions.")
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "timeout", "cancelled"]
    stop_reason: str | int | None = Field(description="The stop string or token id that ended it.")
    seed: int = Field(description="Sent alone with this seed, the prompt gives this output again.")
    logprobs: list[TokenLogprob] | None


class Usage(_Model):
    prompt_tokens: int
    cached_tokens: int = Field(description="Prompt tokens whose keys and values were cached.")
    completion_tokens: int


class Timings(_Model):
    queue_s: float = Field(description="Seconds from arrival to a slot.")
    ttft_s: float | None = Field(
        description="Seconds from arrival to the first token; null if there was none."
    )
    total_s: float = Field(description="Seconds from arrival to the last token.")


class GenerateResponse(_Model):
    id: str
    model: str = Field(description="The model as resolved, with its version.")
    created: AwareDatetime
    outputs: list[Output]
    usage: Usage
    timings: Timings


class Health(_Model):
    """The process is alive. Says nothing about the worker."""

    status: Literal["ok"] = "ok"


class Ready(_Model):
    ready: bool
    reason: (
        Literal["loading", "compiling", "draining", "worker_hung", "worker_restarting"] | None
    ) = Field(None, description="Why it is not ready.")
    progress: float | None = Field(
        None, ge=0, le=1, description="Share of loading and compiling that is done."
    )


class SelfTestResult(_Model):
    """Compared before the first request, and equal to the last bit."""

    passed: Literal[True] = Field(True, description="A service whose test fails does not start.")
    row_counts: list[int] = Field(description="Rows that a decode step was run with.")
    chunk_tokens: list[int] = Field(description="Tokens that a chunk of a prompt was padded to.")
    comparisons: int = Field(description="Rows and positions whose bits were compared.")


class AdapterLimits(_Model):
    """What there is room for."""

    slots: int = Field(description="Adapters that may be in use at once, beside the base.")
    max_rank: int = Field(description="Rank that an adapter may have; 0 where there are no slots.")


class Info(_Model):
    """What is served, on what, and within which limits."""

    model: str
    preset: str
    preset_digest: str
    family: str
    instruct: bool | None = Field(
        description="Whether the model was tuned to follow instructions; null: nothing says so."
    )
    has_tokenizer: bool = Field(
        description="False: only token ids are taken and given; a text is refused."
    )
    parameters: int
    dtype: str
    quantization: str | None
    backend: str
    device: str
    kernels: str = Field(
        description="What computes products: the instruction set of native kernels, or xla."
    )
    kernels_reason: str | None = Field(
        description="Why native kernels do not compute; null where they do."
    )
    context_tokens: int
    slots: int
    vocabulary_size: int
    layers: int
    hidden_dim: int
    limits: dict[str, Any]
    buckets: dict[str, Any]
    programs: list[str]
    self_test: SelfTestResult | None = Field(
        description="That answers do not depend on company, as tried on this machine; null for a "
        "model that needs no such test."
    )
    defaults: dict[str, Any]
    adapters: AdapterLimits
    version: str
