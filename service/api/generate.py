"""POST /generate: whole, or as server-sent events.

No status line leaves before the worker has admitted the request, so a refusal is always a real HTTP
status. What goes wrong after the first byte of a stream is an ``error`` event.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.adapters import ServedModel
from service.api import sse
from service.api.answers import OutputCollector, done_event, seeds, token_event
from service.api.clients import answer_unless_left, check_accept
from service.api.problems import request_id
from service.api.route import StrictRoute
from service.api.schemas import GenerateRequest, GenerateResponse
from service.api.state import ServiceState, State
from service.connection import is_stalled
from service.errors import (
    AdapterMismatch,
    BodyTimeout,
    BodyTooLarge,
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    FieldError,
    InternalError,
    InvalidField,
    Loading,
    MalformedJson,
    ModelNotFound,
    NotAcceptable,
    NumericalError,
    QueueFull,
    ServiceError,
    UnsupportedMediaType,
    WorkerRestarting,
    error_responses,
    problem,
)
from service.observability import GenerationMeter
from service.protocol.messages import (
    BeamSearch,
    ContrastiveSearch,
    Finished,
    Generate,
    Piece,
    SamplingParameters,
    StopRules,
)
from service.worker_client import Generation

router = APIRouter(route_class=StrictRoute)

# Until keys come there is one tenant.
_TENANT = "default"


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={
        200: {
            "description": "The completions; with `stream`, events `start`, `token`*, then `done` "
            "or `error`.",
            "content": {sse.MEDIA_TYPE: {"schema": {"type": "string"}}},
        },
        **error_responses(
            MalformedJson,
            ModelNotFound,
            NotAcceptable,
            BodyTimeout,
            AdapterMismatch,
            BodyTooLarge,
            UnsupportedMediaType,
            InvalidField,
            ContextLengthExceeded,
            QueueFull,
            NumericalError,
            InternalError,
            Loading,
            Draining,
            WorkerRestarting,
            DeadlineExceeded,
        ),
    },
)
async def generate(body: GenerateRequest, request: Request, state: State) -> Any:
    """Generates text from one or several prompts."""
    check_accept(request, sse.MEDIA_TYPE if body.stream else "application/json")
    meter = GenerationMeter(state.metrics, streaming=body.stream)
    try:
        model = state.model(body.model)
        command = _command(body, state, model)
        if state.view.readiness().reason == "draining":
            raise Draining("The service is stopping and takes no new work.")
        generation = await state.worker.start(command, request_id(request.scope))
    except ServiceError as error:
        meter.failed(error.code)
        raise _with_pointers_of(body, error) from None
    except BaseException:
        meter.abandoned()
        raise
    num_prompt_tokens = sum(generation.accepted.num_prompt_tokens)
    meter.admitted(num_prompt_tokens, has_adapter=model.adapter is not None)
    answer = Answer(body, command, generation, state, meter, request_id(request.scope), model)
    if body.stream:
        return GenerationStream(answer)
    return await _whole(answer, request)


class Answer:
    """One admitted request and everything that its answer is made of."""

    def __init__(
        self,
        body: GenerateRequest,
        command: Generate,
        generation: Generation,
        state: ServiceState,
        meter: GenerationMeter,
        http_request_id: str,
        model: ServedModel,
    ) -> None:
        self.id = command.request_id
        self.http_request_id = http_request_id
        self.model = model.name
        self.num_choices = body.n
        self.seeds = seeds(command)
        self.generation = generation
        self.ping_seconds = state.settings.ping_seconds
        self.meter = meter

    @property
    def num_prompt_tokens(self) -> tuple[int, ...]:
        return self.generation.accepted.num_prompt_tokens

    async def next_pieces(self) -> list[Piece]:
        """New pieces, measured; empty after the last."""
        try:
            pieces = await self.generation.next_pieces()
        except ServiceError as error:
            self.meter.failed(error.code)
            raise
        for piece in pieces:
            if piece.token_ids:
                self.meter.tokens(piece.output, len(piece.token_ids))
        return pieces

    @property
    def finished(self) -> Finished:
        """How it ended, once there are no more pieces."""
        finished = self.generation.finished
        assert finished is not None, "the pieces ended without Finished or an error"
        return finished

    def close(self, *, has_stalled: bool = False) -> None:
        """Ends the measuring and, if it is still running, the request; see `Generation.close`.

        A client that ``has_stalled`` did not leave, but was left.
        """
        finished = self.generation.finished
        if finished is not None:
            reasons = [output.finish_reason for output in finished.outputs]
            self.meter.finished(
                list(reasons), finished.timings.queue_seconds, finished.num_cached_tokens
            )
        elif self.generation.is_running:
            self.meter.abandoned("stalled" if has_stalled else "disconnect")
        self.generation.close()


async def _whole(answer: Answer, request: Request) -> Response:
    """The answer in one piece; a client that leaves meanwhile frees its slots."""
    with closing(answer):
        return await answer_unless_left(request, _collect(answer))


async def _collect(answer: Answer) -> Response:
    collector = OutputCollector(answer.num_choices, answer.seeds)
    while pieces := await answer.next_pieces():
        collector.add(pieces)
    body = GenerateResponse(
        id=answer.id,
        model=answer.model,
        created=datetime.now(UTC),
        outputs=collector.outputs(answer.finished),
        usage=collector.usage(answer.num_prompt_tokens, answer.finished),
        timings=collector.timings(answer.finished),
    )
    return Response(
        body.model_dump_json(), media_type="application/json", headers={"X-Model": answer.model}
    )


class GenerationStream(StreamingResponse):
    """A generation as server-sent events. Owns it: however the response ends, it is closed.

    Closing in the body's own ``finally`` would not do: a client that leaves before the first byte
    leaves a generator that never started, and its ``finally`` never runs.
    """

    def __init__(self, answer: Answer) -> None:
        headers = {**sse.HEADERS, "X-Model": answer.model}
        super().__init__(_frames(answer), media_type=sse.MEDIA_TYPE, headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close(has_stalled=is_stalled(scope))


async def _frames(answer: Answer) -> AsyncIterator[bytes]:
    event_id = 0
    start = {
        "id": answer.id,
        "model": answer.model,
        "prompt_tokens": answer.num_prompt_tokens,
        "seeds": answer.seeds,
    }
    yield sse.frame("start", start, event_id)
    try:
        while True:
            try:
                # No task of its own for each token: with a thousand streams that is felt.
                async with asyncio.timeout(answer.ping_seconds):
                    pieces = await answer.next_pieces()
            except TimeoutError:
                yield sse.PING
                continue
            if not pieces:
                break
            for data in token_event(pieces, answer.num_choices):
                event_id += 1
                yield sse.frame("token", data, event_id)
    except ServiceError as error:
        yield sse.frame("error", problem(error, answer.http_request_id), event_id + 1)
        return
    yield sse.frame(
        "done",
        done_event(answer.finished, answer.num_choices, answer.num_prompt_tokens),
        event_id + 1,
    )


def _command(body: GenerateRequest, state: ServiceState, model: ServedModel) -> Generate:
    prompts = tuple(
        prompt if isinstance(prompt, str) else tuple(prompt) for prompt in body.prompts()
    )
    seed = secrets.randbits(32) if body.seed is None else body.seed
    return Generate(
        request_id=f"gen_{uuid4().hex}",
        tenant=_TENANT,
        deadline=time.monotonic() + _seconds_allowed(body, state),
        adapter=model.adapter,
        prompts=prompts,
        num_choices=body.n,
        sampling=SamplingParameters(
            temperature=0.0 if body.sampler == "greedy" else body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            seed=seed,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=tuple((int(key), bias) for key, bias in body.logit_bias.items()),
        ),
        stop=StopRules(
            max_tokens=body.max_tokens,
            min_tokens=body.min_tokens,
            strings=tuple(body.stop),
            token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            max_length=body.max_length,
        ),
        num_logprobs=body.logprobs,
        echo=body.echo,
        priority=body.priority,
        search=_search(body),
        interventions=tuple(each.command() for each in body.interventions),
    )


def _search(body: GenerateRequest) -> BeamSearch | ContrastiveSearch | None:
    match body.sampler:
        case "beam":
            return BeamSearch(body.num_beams)
        case "contrastive":
            return ContrastiveSearch(body.top_k, body.contrastive_alpha)
        case _:
            return None


def _seconds_allowed(body: GenerateRequest, state: ServiceState) -> float:
    limit = state.settings.request_timeout_seconds
    return limit if body.timeout_s is None else min(body.timeout_s, limit)


def _with_pointers_of(body: GenerateRequest, error: ServiceError) -> ServiceError:
    """The worker counts prompts even where the body holds one that stands alone."""
    is_alone = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    if is_alone:
        error.errors = tuple(
            FieldError(field.pointer.replace("/prompt/0", "/prompt", 1), field.detail)
            for field in error.errors
        )
    return error
