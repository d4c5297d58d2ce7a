"""Between the protocol and the model: types one way, errors the other.

The model raises `model.errors` only, and this is the only place that maps them to codes.
"""

from dataclasses import asdict
from pathlib import Path

from model.errors import ModelError, RequestInvalid, SequenceTooLong, TokenOutOfRange
from model.slots import (
    AdapterForm,
    EngineInfo,
    EngineOptions,
    SampledToken,
    Sampling,
    TextCodec,
)
from service.protocol.messages import (
    Load,
    SamplingParameters,
    SelfTest,
    ServerInfo,
    TokenLogprob,
    TokenLogprobs,
)
from service.protocol.training import Form

_SEED_LIMIT = 2**32


def engine_options(load: Load) -> EngineOptions:
    return EngineOptions(
        preset=load.preset,
        num_slots=load.num_slots,
        context_tokens=load.context_tokens,
        cache_dir=Path(load.cache_dir),
        prefix_cache_bytes=load.prefix_cache_bytes,
        kernels=load.kernels,
        adapter_slots=load.adapter_slots,
        adapter_max_rank=load.adapter_max_rank,
    )


def server_info(info: EngineInfo) -> ServerInfo:
    """What `/info` shows of the engine."""
    shown = {name: getattr(info, name) for name in ServerInfo.__struct_fields__}
    if info.self_test is not None:
        shown["self_test"] = SelfTest(**asdict(info.self_test))
    return ServerInfo(**shown)


def form_of(form: AdapterForm) -> Form:
    """What an adapter is made of, as it is told."""
    return Form(form.layout, form.rank, form.alpha, form.targets)


def sampling_of_output(parameters: SamplingParameters, output: int) -> Sampling:
    """The draw of output k: its seed is (seed + k) mod 2³², so that it can be sent alone again."""
    return Sampling(
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        seed=(parameters.seed + output) % _SEED_LIMIT,
        min_p=parameters.min_p,
        repetition_penalty=parameters.repetition_penalty,
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
        logit_bias=parameters.logit_bias,
    )


def token_logprobs(token: SampledToken, codec: TextCodec) -> TokenLogprobs:
    """A sampled token that has a log-probability, with its alternatives."""
    assert token.logprob is not None
    return TokenLogprobs(
        chosen=token_logprob(token.token_id, token.logprob, codec),
        top=tuple(token_logprob(id_, logprob, codec) for id_, logprob in token.top),
    )


def token_logprob(token_id: int, logprob: float, codec: TextCodec) -> TokenLogprob:
    """A token and what it says, with its log-probability."""
    return TokenLogprob(
        id=token_id,
        token=codec.piece(token_id),
        bytes=tuple(codec.piece_bytes(token_id)),
        logprob=logprob,
    )


def error_code(error: ModelError) -> str:
    """The code under which a caller sees an error of the model; most specific class first."""
    match error:
        case SequenceTooLong():
            return "context_length_exceeded"
        case TokenOutOfRange() | RequestInvalid():
            return "invalid_field"
        case _:
            return "internal"
