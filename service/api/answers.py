"""The worker's events as what a client reads: whole outputs, or the data of stream events."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec.structs

from service.api.schemas import Output, Timings, TokenLogprob, TopLogprob, Usage
from service.protocol import messages as protocol
from service.protocol.messages import Finished, Generate, Piece, TokenLogprobs

_SEED_LIMIT = 2**32


def seeds(command: Generate) -> list[int]:
    """The seed of every output, in order."""
    num_outputs = len(command.prompts) * command.num_choices
    return [(command.sampling.seed + output) % _SEED_LIMIT for output in range(num_outputs)]


class OutputCollector:
    """Joins the pieces of every output."""

    def __init__(self, num_choices: int, output_seeds: Sequence[int]) -> None:
        self._num_choices = num_choices
        self._seeds = output_seeds
        self._pieces: list[list[Piece]] = [[] for _ in output_seeds]

    def add(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._pieces[piece.output].append(piece)

    def outputs(self, finished: Finished) -> list[Output]:
        return [
            self._output(number, pieces, finished) for number, pieces in enumerate(self._pieces)
        ]

    def _output(self, number: int, pieces: list[Piece], finished: Finished) -> Output:
        end = finished.outputs[number]
        logprobs = [_logprobs(entry) for piece in pieces for entry in piece.logprobs]
        return Output(
            **_place(number, self._num_choices),
            text="".join(piece.text for piece in pieces),
            token_ids=[token_id for piece in pieces for token_id in piece.token_ids],
            finish_reason=end.finish_reason,
            stop_reason=end.stop_reason,
            seed=self._seeds[number],
            logprobs=logprobs or None,
        )

    def usage(self, num_prompt_tokens: Sequence[int], finished: Finished) -> Usage:
        num_tokens = sum(len(piece.token_ids) for pieces in self._pieces for piece in pieces)
        return _usage(num_prompt_tokens, finished, num_tokens)

    def timings(self, finished: Finished) -> Timings:
        return _timings(finished)


def token_event(pieces: Sequence[Piece], num_choices: int) -> Iterator[dict[str, Any]]:
    """The data of one ``token`` event for each output that has news.

    Pieces of one output that waited together are joined: a slow client gets fewer, larger events.
    """
    by_output: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_output.setdefault(piece.output, []).append(piece)
    for output, group in by_output.items():
        logprobs = [_logprobs(entry).model_dump() for piece in group for entry in piece.logprobs]
        yield {
            **_place(output, num_choices),
            "text": "".join(piece.text for piece in group),
            "token_ids": [token_id for piece in group for token_id in piece.token_ids],
            "logprobs": logprobs or None,
        }


def done_event(
    finished: Finished, num_choices: int, num_prompt_tokens: Sequence[int]
) -> dict[str, Any]:
    """The data of the ``done`` event."""
    outputs = [
        {
            **_place(number, num_choices),
            "finish_reason": end.finish_reason,
            "stop_reason": end.stop_reason,
        }
        for number, end in enumerate(finished.outputs)
    ]
    num_tokens = sum(end.num_tokens for end in finished.outputs)
    return {
        "outputs": outputs,
        "usage": _usage(num_prompt_tokens, finished, num_tokens).model_dump(),
        "timings": _timings(finished).model_dump(),
    }


def _place(output: int, num_choices: int) -> dict[str, int]:
    return {"prompt_index": output // num_choices, "index": output % num_choices}


def _usage(
    num_prompt_tokens: Sequence[int], finished: Finished, num_completion_tokens: int
) -> Usage:
    return Usage(
        prompt_tokens=sum(num_prompt_tokens),
        cached_tokens=finished.num_cached_tokens,
        completion_tokens=num_completion_tokens,
    )


def _timings(finished: Finished) -> Timings:
    timings = finished.timings
    return Timings(
        queue_s=timings.queue_seconds,
        ttft_s=timings.first_token_seconds,
        total_s=timings.total_seconds,
    )


def _logprobs(entry: TokenLogprobs) -> TokenLogprob:
    top = [TopLogprob(**_fields(token)) for token in entry.top]
    return TokenLogprob(**_fields(entry.chosen), top=top)


def _fields(token: protocol.TokenLogprob) -> dict[str, Any]:
    return {**msgspec.structs.asdict(token), "bytes": list(token.bytes)}
