"""POST /score: its fields and its answer."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

from service.client.call import JSON, SAFETENSORS, Answer, Call, check_names, read, to_json
from service.client.errors import UnexpectedAnswer
from service.client.residual_stream import Capture, Intervention
from service.client.tokens import TokenLogprob


class ContextInput(TypedDict):
    """What may follow a context."""

    context: str
    targets: Sequence[str]


class TextInput(TypedDict):
    """A whole text."""

    text: str


class IdsInput(TypedDict):
    """Token ids, as they are."""

    token_ids: Sequence[int]
    target_ids: NotRequired[Sequence[int]]
    target_mask: NotRequired[Sequence[int]]


ScoreInput: TypeAlias = ContextInput | TextInput | IdsInput
ScoreReturn: TypeAlias = Literal["logprob", "tokens", "top", "loss", "prob", "greedy", "logits"]


class AttributionField(TypedDict):
    """What log-probabilities are to be traced back to."""

    method: Literal["gradient", "integrated_gradients"]
    of: Literal["target_logprob", "loss_sum"]
    target: NotRequired[int]
    layer: NotRequired[int]
    reduce: NotRequired[Literal["none", "dot_input", "l2"]]
    steps: NotRequired[int | None]


class ScoreFields(TypedDict, total=False):
    """What may be said beside the inputs; ``return_`` is the field ``return``."""

    model: str | None
    models: Sequence[str] | None
    return_: Sequence[ScoreReturn]
    top: int
    capture: Sequence[Capture]
    interventions: Sequence[Intervention]
    attribution: AttributionField | None
    timeout_s: float | None
    priority: int


class ScoredToken(TokenLogprob):
    """A token of a target.

    Attributes:
        position: Where it stands in its text, ``<bos>`` being 0.
        rank: How many tokens are likelier there.
    """

    position: int
    rank: int


class ScoredTarget(Answer):
    """One target; what ``return_`` does not name is None."""

    text: str | None
    num_tokens: int
    num_bytes: int
    logprob: float | None = None
    loss: float | None = None
    prob: float | None = None
    greedy: bool | None = None
    tokens: list[ScoredToken] | None = None


class Tensor(Answer):
    """Numbers, little-endian and row by row.

    ``np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape)`` is an array of them.

    Attributes:
        b64: In base64, in an answer as JSON.
        name: In an answer as a safetensors file: under which they are there.
    """

    b64: str | None = None
    name: str | None = None
    dtype: str
    shape: list[int]
    _data: bytes = b""

    def model_post_init(self, context: Any) -> None:
        """Takes the numbers out of ``context``, the tensors of the file that the answer came in."""
        if self.b64 is not None:
            self._data = base64.b64decode(self.b64, validate=True)
            return
        tensors: Mapping[str, bytes] = context or {}
        if self.name is None or self.name not in tensors:
            raise ValueError("the numbers of a tensor are not there")
        self._data = tensors[self.name]

    @property
    def data(self) -> bytes:
        """The bytes of the numbers."""
        return self._data


class Logits(Answer):
    """All logits in front of each token of a target, [positions, vocabulary]."""

    positions: list[int]
    tensor: Tensor


class CapturedStream(Answer):
    """The residual stream of one text at one layer: the tensor is [positions, width]."""

    target_index: int
    layer: int
    positions: list[int]
    tensor: Tensor


class TokenAttribution(Answer):
    """A token, and what was traced back to it."""

    position: int
    id: int
    token: str
    score: float


class Attribution(Answer):
    """What the tokens of a text have to do with a log-probability.

    Attributes:
        of: Which log-probability.
        layer: By the residual stream there.
        scores: One for each token, unless ``reduce`` was ``none``.
        tensor: [tokens, width], if it was.
        completeness_error: Of integrated gradients.
    """

    of: str
    layer: int
    scores: list[TokenAttribution] | None
    tensor: Tensor | None
    completeness_error: float | None


class Divergence(Answer):
    """KL(first ‖ other), in nats, where each token of a target is expected."""

    input_index: int
    target_index: int
    models: list[str]
    per_token: list[float]


class ScoreResult(Answer):
    """Of one input under one model; what was not asked for is None."""

    input_index: int
    model: str
    prompt_tokens: int
    targets: list[ScoredTarget]
    captures: list[CapturedStream] | None = None
    logits: Logits | None = None
    attribution: Attribution | None = None


class ScoreUsage(Answer):
    """Tokens of contexts, their targets and whole texts."""

    prompt_tokens: int
    cached_tokens: int


class ScoreTimings(Answer):
    """Seconds from arrival: to the first chunk, to the last score."""

    queue_s: float
    total_s: float


class Scores(Answer):
    """One result for each input, in order, and with ``models`` one for each of these.

    Attributes:
        kl: How far each model is from the first of several.
    """

    id: str
    model: str
    results: list[ScoreResult]
    usage: ScoreUsage
    timings: ScoreTimings
    kl: list[Divergence] | None = None


def score_call(
    inputs: Sequence[ScoreInput],
    fields: ScoreFields,
    request_id: str | None = None,
    *,
    as_safetensors: bool = False,
) -> Call:
    """What the inputs are worth."""
    check_names(fields, ScoreFields, "score")
    # `return` is a word of Python's.
    named = {name.rstrip("_"): value for name, value in fields.items()}
    accept = SAFETENSORS if as_safetensors else JSON
    body = to_json({"inputs": inputs, **named})
    return Call("POST", "/score", body, accept=accept, request_id=request_id)


def read_scores(body: bytes, *, as_safetensors: bool) -> Scores:
    """The answer, in either form."""
    if not as_safetensors:
        return read(Scores, body)
    text, tensors = _opened(body)
    return read(Scores, text, tensors)


def _opened(body: bytes) -> tuple[str, dict[str, bytes]]:
    """The JSON of the answer in a safetensors file, and the numbers of its tensors by name."""
    try:
        start = 8 + int.from_bytes(body[:8], "little")
        header = dict(json.loads(body[8:start]))
        text = str(header.pop("__metadata__")["answer"])
        offsets = {name: each["data_offsets"] for name, each in header.items()}
        tensors = {
            name: body[start + begin : start + end] for name, (begin, end) in offsets.items()
        }
        is_whole = all(len(tensors[name]) == end - begin for name, (begin, end) in offsets.items())
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        detail = "The answer is no whole safetensors file. Is this the address of a Gemma service?"
        raise UnexpectedAnswer(detail)
    return text, tensors
