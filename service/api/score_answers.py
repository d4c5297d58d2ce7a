"""The answer of `POST /score`, out of the event that ends a request."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from service.api.safetensors import Dtype, TensorForm
from service.api.schemas import TopLogprob
from service.api.score_schemas import (
    Attribution,
    AttributionRequest,
    CapturedStream,
    Divergence,
    Logits,
    ScoredTarget,
    ScoredToken,
    ScoreInput,
    ScoreRequest,
    ScoreResponse,
    ScoreResult,
    ScoreTimings,
    ScoreUsage,
    Tensor,
    TokenAttribution,
)
from service.protocol import messages as protocol
from service.protocol.messages import InputAttribution, InputScore, Scored, TargetScore, TokenScore


def score_response(
    scored: Scored, body: ScoreRequest, models: Sequence[str], form: TensorForm
) -> ScoreResponse:
    """What was found, under the resolved names of the models, with tensors in a form."""
    versions = (scored.inputs, *scored.compared)
    pairs = [
        (index, model, found[index])
        for index in range(len(body.inputs))
        for model, found in zip(models, versions, strict=True)
    ]
    results = [
        _result(*pair, body, _Tensors(form, f"results.{number}"))
        for number, pair in enumerate(pairs)
    ]
    num_tokens = sum(
        result.prompt_tokens
        + sum(
            target.num_tokens
            for target in result.targets
            if body.inputs[result.input_index].context is not None
        )
        for result in results
    )
    response = ScoreResponse(
        id=scored.request_id,
        model=models[0],
        results=results,
        usage=ScoreUsage(prompt_tokens=num_tokens, cached_tokens=0),
        timings=ScoreTimings(
            queue_s=scored.timings.queue_seconds, total_s=scored.timings.total_seconds
        ),
    )
    if len(models) > 1:
        response.kl = [
            Divergence(
                input_index=each.input_index,
                target_index=each.target_index,
                models=[models[0], models[each.version]],
                per_token=list(each.per_token),
            )
            for each in sorted(scored.divergences, key=_place_of)
        ]
    return response


def _place_of(divergence: protocol.TargetDivergence) -> tuple[int, int, int]:
    return divergence.input_index, divergence.target_index, divergence.version


@dataclass(frozen=True, slots=True)
class _Tensors:
    """Those of one result, named after their place in the answer."""

    form: TensorForm
    place: str

    def of(self, name: str, numbers: bytes, num_rows: int, dtype: Dtype = "float32") -> Tensor:
        size = 2 if dtype == "float16" else 4
        width = len(numbers) // (size * num_rows) if num_rows else 0
        return self.form.tensor(f"{self.place}.{name}", dtype, [num_rows, width], numbers)


def _result(
    index: int, model: str, found: InputScore, body: ScoreRequest, tensors: _Tensors
) -> ScoreResult:
    """One input under one model; what was not asked for stays unset, and so is not sent."""
    result = ScoreResult(
        input_index=index,
        model=model,
        prompt_tokens=found.num_prompt_tokens,
        targets=_targets(found, body.inputs[index], body.return_),
    )
    if body.capture:
        result.captures = [
            _captured(each, tensors, f"captures.{number}")
            for number, each in enumerate(found.captures)
        ]
    if "logits" in body.return_:
        result.logits = _logits(found, tensors)
    if body.attribution is not None:
        assert found.attribution is not None, "it was asked for"
        result.attribution = _attribution(found.attribution, body.attribution, tensors)
    return result


def _targets(found: InputScore, given: ScoreInput, wanted: Sequence[str]) -> list[ScoredTarget]:
    texts: Sequence[str | None] = given.targets or [given.text]
    total = _log_sum([target.logprob for target in found.targets])
    return [
        _target(target, text, total, wanted)
        for target, text in zip(found.targets, texts, strict=True)
    ]


def _target(
    target: TargetScore, text: str | None, total: float, wanted: Sequence[str]
) -> ScoredTarget:
    """With the fields that are wanted; the others stay unset, and so are not sent."""
    told = ScoredTarget(text=text, num_tokens=target.num_tokens, num_bytes=target.num_bytes)
    tells_tokens = "tokens" in wanted or "top" in wanted
    if "logprob" in wanted or tells_tokens:
        told.logprob = target.logprob
    if "loss" in wanted:
        told.loss = -target.logprob / target.num_tokens
    if "prob" in wanted:
        told.prob = math.exp(target.logprob - total)
    if "greedy" in wanted:
        told.greedy = target.is_greedy
    if tells_tokens:
        told.tokens = [_token(token) for token in target.tokens]
    return told


def _logits(found: InputScore, tensors: _Tensors) -> Logits:
    """Of the one target; it tells its tokens whenever there are logits."""
    [target] = found.targets
    positions = [token.position - 1 for token in target.tokens]
    tensor = tensors.of("logits", found.logits, len(positions))
    return Logits(positions=positions, tensor=tensor)


def _captured(found: protocol.CapturedStream, tensors: _Tensors, name: str) -> CapturedStream:
    dtype: Dtype = "float16" if found.is_half else "float32"
    return CapturedStream(
        target_index=found.target_index,
        layer=found.layer,
        positions=list(found.positions),
        tensor=tensors.of(name, found.numbers, len(found.positions), dtype),
    )


def _attribution(
    found: InputAttribution, asked: AttributionRequest, tensors: _Tensors
) -> Attribution:
    scores, tensor = None, None
    if asked.reduce == "none":
        tensor = tensors.of("attribution", found.tensor, found.num_tokens)
    else:
        scores = [
            TokenAttribution(position=position, id=each.id, token=each.token, score=each.score)
            for position, each in enumerate(found.tokens)
        ]
    return Attribution(
        of=asked.of,
        layer=asked.layer,
        scores=scores,
        tensor=tensor,
        completeness_error=found.completeness_error,
    )


def _log_sum(logprobs: Sequence[float]) -> float:
    most = max(logprobs)
    return most + math.log(sum(math.exp(logprob - most) for logprob in logprobs))


def _token(found: TokenScore) -> ScoredToken:
    return ScoredToken(
        **_fields(found.token),
        top=[TopLogprob(**_fields(token)) for token in found.top],
        position=found.position,
        rank=found.rank,
    )


def _fields(token: protocol.TokenLogprob) -> dict[str, Any]:
    return {**msgspec.structs.asdict(token), "bytes": list(token.bytes)}
