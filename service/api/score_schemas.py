"""What `POST /score` takes and gives. Each number has a closed range, checked here first."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from service.api.intervention_schemas import MAX_CAPTURES, Capture, Interventions
from service.api.schemas import (
    MAX_FIELDS,
    MAX_VOCABULARY,
    ModelName,
    TokenLogprob,
    _check_token_ids,
)
from service.api.strict_model import MAX_TOKENS, StrictModel as _Model, refusal as _refusal

MAX_INPUTS = 64
MAX_TARGETS = 64
# Versions of the model that one request may name.
MAX_MODELS = 4
MAX_TOP = 20
MAX_LOGIT_PLACES = 16
# As in `model.attribution_questions` and `service.worker.attribution_jobs`; a test compares.
MAX_ATTRIBUTION_TOKENS = 512
MAX_ATTRIBUTION_STEPS = 64
MAX_ATTRIBUTION_WORK = 32_768
MAX_ATTRIBUTION_BYTES = 8 * 1024 * 1024
# More than any model has; the worker knows how many there are.
_MAX_LAYERS = 1024
_TOKEN_FIELDS = ("tokens", "top")


def _check_ids(value: object) -> object:
    if not isinstance(value, list):
        raise _refusal((), "should be a list of token ids")
    if not 1 <= len(value) <= MAX_TOKENS:
        raise _refusal((), f"should have 1 to {MAX_TOKENS} token ids")
    _check_token_ids(value, ())
    return value


def _check_mask(value: object) -> object:
    if not isinstance(value, list):
        raise _refusal((), "should be a list of zeros and ones")
    # Not by value alone: true is 1.
    if set(map(type, value)) - {int} or set(value) - {0, 1}:
        place = next(i for i, x in enumerate(value) if type(x) is not int or x not in (0, 1))
        raise _refusal((place,), "should be 0 or 1")
    return value


_Ids = Annotated[
    list[int],
    PlainValidator(_check_ids),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_VOCABULARY},
            "minItems": 1,
            "maxItems": MAX_TOKENS,
        }
    ),
]
_Mask = Annotated[
    list[int],
    PlainValidator(_check_mask),
    WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 1}}),
]
# Which fields stand together.
_KINDS: dict[str, tuple[str, ...]] = {
    "context": ("targets",),
    "text": (),
    "token_ids": ("target_ids", "target_mask"),
}


class ScoreInput(_Model):
    """One of three: `context` with `targets`, `text`, or `token_ids`."""

    context: str | None = Field(
        None, description="What stands before each target; `<bos>` is put in front of it."
    )
    targets: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_TARGETS),
        ]
        | None
    ) = Field(
        None,
        description="What may follow the context. The tokens of a target are those of context and "
        "target together, behind as many as the context has. The context is read once.",
    )
    text: str | None = Field(
        None, description="A whole text: every token after `<bos>` is a target."
    )
    token_ids: _Ids | None = Field(None, description="Token ids, taken as they are.")
    target_ids: _Ids | None = Field(
        None,
        description="As long as `token_ids`: what is asked about behind each of them. Left out: "
        "the tokens themselves, each behind those before it.",
    )
    target_mask: _Mask | None = Field(
        None,
        description="As long as `token_ids`. With `target_ids`, 1 where one of these is a target; "
        "without, where a token itself is one, which the first never is. Left out: all.",
    )

    @model_validator(mode="after")
    def _check_kind(self) -> "ScoreInput":
        kinds = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise _refusal((), "should have one of context, text and token_ids")
        [kind] = kinds
        for other, fields in _KINDS.items():
            for name in fields:
                if other != kind and getattr(self, name) is not None:
                    raise _refusal((name,), f"should be left out: it belongs to {other}")
        if kind == "context" and self.targets is None:
            raise _refusal(("targets",), "is required with a context")
        if self.token_ids is not None:
            self._check_lengths(len(self.token_ids))
        return self

    def _check_lengths(self, num_tokens: int) -> None:
        for name in _KINDS["token_ids"]:
            given = getattr(self, name)
            if given is not None and len(given) != num_tokens:
                raise _refusal((name,), f"should be as long as token_ids, {num_tokens}")
        if self.target_ids is None:
            if num_tokens < 2:
                raise _refusal(("token_ids",), "should have a token behind the first to score")
            if self.target_mask and self.target_mask[0]:
                raise _refusal(("target_mask", 0), "should be 0: nothing stands before it")
        if self.target_mask is not None and 1 not in self.target_mask:
            raise _refusal(("target_mask",), "should have a 1")


class AttributionRequest(_Model):
    """Which log-probabilities are traced back to the tokens of their text, and how."""

    method: Literal["gradient", "integrated_gradients"] = Field(
        description="`gradient`: the derivative at the text. `integrated_gradients`: summed along "
        "the line from (almost) zero to what the model sees, so that all numbers together are what "
        "the log-probability changes on the way."
    )
    of: Literal["target_logprob", "loss_sum"] = Field(
        description="The log-probability of one target of each input, or the negative sum of "
        "those of all of them. With several targets a sum is told for the tokens of the context "
        "that all of them share."
    )
    target: int = Field(
        0, ge=0, lt=MAX_TARGETS, description="Which target of each input, with `target_logprob`."
    )
    layer: int = Field(
        -1,
        ge=-1,
        lt=_MAX_LAYERS,
        description="−1: the embeddings before they are scaled; n: the residual stream behind "
        "block n.",
    )
    reduce: Literal["none", "dot_input", "l2"] = Field(
        "dot_input",
        description="`none`: all numbers of each token, as a tensor. `dot_input`: one for each "
        "token, the gradient times what it is a derivative by, or the sum of its integrated "
        "gradients; positive pushes what `of` names up. `l2`: their norm.",
    )
    steps: Annotated[int, Field(ge=1, le=MAX_ATTRIBUTION_STEPS)] | None = Field(
        None,
        description=f"Parts of the line that have a derivative each, with `integrated_gradients`; "
        f"null: {MAX_ATTRIBUTION_STEPS}. Fewer cost less, and `completeness_error` tells what they "
        "miss. Up to twice as many are made where they do not tell what the line changes by.",
    )

    @model_validator(mode="after")
    def _check_fields_together(self) -> "AttributionRequest":
        if self.method == "gradient" and self.steps is not None:
            raise _refusal(("steps",), "should be left out: it belongs to integrated_gradients")
        if self.of == "loss_sum" and "target" in self.model_fields_set:
            raise _refusal(("target",), "should be left out: it belongs to target_logprob")
        return self

    @property
    def num_steps(self) -> int:
        """Of integrated gradients; 0 for the gradient."""
        if self.method == "gradient":
            return 0
        return MAX_ATTRIBUTION_STEPS if self.steps is None else self.steps


class ScoreRequest(_Model):
    """Inputs, and what is to be told of their targets."""

    model: ModelName | None = Field(
        None, description="As in `/generate`: the base, or an adapter version; left out, the base."
    )
    models: Annotated[list[ModelName], Field(min_length=1, max_length=MAX_MODELS)] | None = Field(
        None,
        description="In place of `model`: different versions, each of which scores the same. `kl` "
        "then says how far each is from the first. Not with `attribution`, which is of the base.",
    )
    inputs: list[ScoreInput] = Field(
        min_length=1, max_length=MAX_INPUTS, description="Each is scored for itself."
    )
    return_: list[Literal["logprob", "tokens", "top", "loss", "prob", "greedy", "logits"]] = Field(
        default=["logprob"],
        alias="return",
        min_length=1,
        max_length=16,
        description="What is told of a target: `logprob` of all of its tokens together; `loss`, "
        "its negative for each token on average; `prob`, its share among the targets of its input; "
        "`greedy`, whether each of its tokens is the likeliest; `tokens`, each with its "
        "log-probability and rank; `top`, the same with alternatives; `logits`, all of them in "
        "front of each token, for one input of one target of at most 16 tokens, counted once for "
        "each model.",
    )
    top: int = Field(
        0, ge=0, le=MAX_TOP, description="Alternatives of each token that is told, best first."
    )
    interventions: Interventions = Field(
        default_factory=list,
        description="Changes of the residual stream of every text, in this order; at most 4.",
    )
    capture: list[Capture] = Field(
        default_factory=list,
        max_length=MAX_CAPTURES,
        description="What is told of the residual stream of every text, after interventions; at "
        "most 8 MiB, with logits 16 MiB.",
    )
    attribution: AttributionRequest | None = Field(
        None,
        description=f"Traces log-probabilities back to tokens, for texts of at most "
        f"{MAX_ATTRIBUTION_TOKENS} tokens; all of them, once for each step, may have "
        f"{MAX_ATTRIBUTION_WORK} tokens.",
    )
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = Field(
        None,
        description="Seconds after which the request fails if it has not ended; at most the "
        "server's own limit, which null means.",
    )
    priority: int = Field(
        0,
        ge=-8,
        le=8,
        description="Who waits with a higher priority is read before anyone with a lower one.",
    )

    @model_validator(mode="before")
    @classmethod
    def _check_field_count(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise _refusal((), f"should have at most {MAX_FIELDS} fields")
        return data

    @model_validator(mode="after")
    def _check_fields_together(self) -> "ScoreRequest":
        if self.models is not None:
            if self.model is not None:
                raise _refusal(("models",), "should stand in place of model, not beside it")
            if len(set(self.models)) < len(self.models):
                raise _refusal(("models",), "should name each model once")
        if "logits" in self.return_ and len(self.inputs) > 1:
            raise _refusal(("inputs",), "should be one if return names logits")
        if self.top and not self.tells_tokens:
            raise _refusal(("top",), "should be 0 unless return names tokens or top")
        if "top" in self.return_ and not self.top:
            raise _refusal(("top",), "should be at least 1 if return names top")
        return self

    @property
    def tells_tokens(self) -> bool:
        """Whether each token is told."""
        return any(name in self.return_ for name in _TOKEN_FIELDS)


class ScoredToken(TokenLogprob):
    """A token of a target; `top` has the likeliest ones in its place."""

    position: int = Field(description="Where it stands in its text, `<bos>` being 0.")
    rank: int = Field(description="How many tokens are likelier there, or as likely with lower id.")


class ScoredTarget(_Model):
    """One target. What `return` does not name is left out."""

    text: str | None = Field(description="As it was sent; null for token ids.")
    num_tokens: int
    num_bytes: int = Field(description="Of its text in UTF-8, or of the text of its tokens.")
    logprob: float | None = Field(
        None, description="Natural logarithm, under the model's own distribution."
    )
    loss: float | None = None
    prob: float | None = None
    greedy: bool | None = None
    tokens: list[ScoredToken] | None = None


class Tensor(_Model):
    """Numbers, little-endian and row by row: here in base64, or in the file that this is in."""

    b64: str | None = Field(None, description="The numbers, in an answer as JSON.")
    name: str | None = Field(
        None, description="Where they are in the file, in an answer as `application/x-safetensors`."
    )
    dtype: Literal["float16", "float32"]
    shape: list[int]


class Logits(_Model):
    """The model's own, before any sampling rule."""

    positions: list[int] = Field(description="Each of these is followed by a token of the target.")
    tensor: Tensor = Field(description="[positions, vocabulary].")


class CapturedStream(_Model):
    """The residual stream of one text at one layer."""

    target_index: int = Field(description="Of whose text: that of this target behind the context.")
    layer: int
    positions: list[int] = Field(description="Of the tokens, ascending, `<bos>` being 0.")
    tensor: Tensor = Field(description="[positions, hidden_dim].")


class TokenAttribution(_Model):
    position: int
    id: int
    token: str
    score: float


class Attribution(_Model):
    """What the tokens of a text have to do with the log-probability that `of` names."""

    of: Literal["target_logprob", "loss_sum"]
    layer: int
    scores: list[TokenAttribution] | None = Field(description="Null if `reduce` is `none`.")
    tensor: Tensor | None = Field(description="[tokens, width], if `reduce` is `none`.")
    completeness_error: float | None = Field(
        description="Of integrated gradients: |sum over all tokens − (f(x) − f(0))| / "
        "|f(x) − f(0)|, where f(0) is taken at 2⁻¹⁰ of x, as norms have no value at zero that "
        "those beside it come near to."
    )


class Divergence(_Model):
    """How far a model is from the first one where the tokens of a target are expected."""

    input_index: int
    target_index: int
    models: list[str] = Field(description="The first of `models` and another, as resolved.")
    per_token: list[Annotated[float, Field(ge=0)]] = Field(
        description="For each token of the target, the Kullback–Leibler divergence of the first "
        "one's distribution there from the other's, in nats, over the whole vocabulary at "
        "temperature 1: the sum of p · (log p − log q)."
    )


class ScoreResult(_Model):
    """One input, under one model.

    `logits` stand here only if `return` names them, `captures` if there are any, and `attribution`
    if it was asked for.
    """

    input_index: int
    model: str = Field(description="The model as resolved, with its version.")
    prompt_tokens: int = Field(description="Tokens of the context, or of the whole text.")
    targets: list[ScoredTarget]
    captures: list[CapturedStream] | None = Field(
        None,
        description="Target by target, then in the order of `capture`, each layer by itself.",
    )
    logits: Logits | None = None
    attribution: Attribution | None = None


class ScoreUsage(_Model):
    prompt_tokens: int = Field(
        description="Tokens of contexts, their targets and whole texts, once for each model."
    )
    cached_tokens: int = Field(description="Tokens whose keys and values were cached.")


class ScoreTimings(_Model):
    queue_s: float = Field(description="Seconds from arrival to the first chunk.")
    total_s: float = Field(description="Seconds from arrival to the last score.")


class ScoreResponse(_Model):
    id: str
    model: str = Field(description="The model as resolved, with its version; of several the first.")
    results: list[ScoreResult] = Field(
        description="Input by input; with several `models`, one for each of them, in their order."
    )
    usage: ScoreUsage
    timings: ScoreTimings
    kl: list[Divergence] | None = Field(
        None,
        description="Target by target and model by model; here only if several are compared.",
    )
