"""`GemmaClient` and, for asyncio, `AsyncGemmaClient`: one method for each thing the service does.

Neither has logic of its own. What is sent and how an answer is read stands in one file for each
resource (`generate`, `score`, `ops`); when it is sent again, in `retries`.
"""

from collections.abc import Sequence
from typing import Self, Unpack

from service.client import ops
from service.client.call import read
from service.client.generate import (
    GenerateFields,
    Generation,
    Prompt,
    generate_call,
    stream_call,
)
from service.client.ops import Health, Info, Ready
from service.client.retries import RetryRules
from service.client.score import ScoreFields, ScoreInput, Scores, score_call
from service.client.streams import AsyncGenerationStream, GenerationStream
from service.client.transport import AsyncTransport, Transport

DEFAULT_URL = "http://127.0.0.1:8000"
_MAX_RETRIES = 2
_TIMEOUT_S = 600.0
_READY_S = 600.0


class GemmaClient:
    """A Gemma service at an address.

        with GemmaClient() as client:
            print(client.generate("The capital of France is", max_tokens=8).text)

    Threads may share one. Every method raises `GemmaError`; `service.client.errors` has the tree.

    Args:
        url: Address of the service.
        max_retries: How often a request is sent again that was refused for now, or found nobody.
        timeout_s: Seconds for a whole answer, retries included; of a stream, for its beginning and
            then for each silence. The service breaks silence every 10 s.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        max_retries: int = _MAX_RETRIES,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        self._transport = Transport(url, RetryRules(max_retries, timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections; what runs over them ends."""
        self._transport.close()

    def generate(self, prompt: Prompt, **fields: Unpack[GenerateFields]) -> Generation:
        """Continues one or several prompts; `GenerateFields` has the names of the rest."""
        return read(Generation, self._transport.send(generate_call(prompt, fields)))

    def stream(self, prompt: Prompt, **fields: Unpack[GenerateFields]) -> GenerationStream:
        """The same as it comes.

        with client.stream("Once upon a time") as stream:
            for text in stream.text:
                print(text, end="", flush=True)
        """
        return GenerationStream(self._transport, stream_call(prompt, fields))

    def score(self, inputs: Sequence[ScoreInput], **fields: Unpack[ScoreFields]) -> Scores:
        """How likely texts are; ``return_`` names what is told of each target."""
        return read(Scores, self._transport.send(score_call(inputs, fields)))

    def cancel(self, request_id: str) -> None:
        """Ends a running request, whose own answer then has what there was."""
        self._transport.send(ops.cancel_call(request_id))

    def info(self) -> Info:
        """What is served, within which limits."""
        return read(Info, self._transport.send(ops.INFO))

    def health(self) -> Health:
        """That the process runs."""
        return read(Health, self._transport.send(ops.HEALTH))

    def ready(self) -> Ready:
        """Whether work is taken now, and why not."""
        return read(Ready, self._transport.send(ops.READY))

    def wait_until_ready(self, timeout_s: float = _READY_S) -> Ready:
        """Waits for a service that is still starting, or that will be started.

        Raises:
            Unavailable: It was not ready in time; says why.
            ConnectionFailed: Nobody was there in time.
        """
        rules = RetryRules(None, timeout_s)
        return read(Ready, self._transport.send(ops.READY_AT_LAST, rules))


class AsyncGemmaClient:
    """The same for asyncio: ``await client.generate(...)``, ``async with client.stream(...)``.

    A task that is cancelled while it waits closes its connection, which frees the slots.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        max_retries: int = _MAX_RETRIES,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        self._transport = AsyncTransport(url, RetryRules(max_retries, timeout_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._transport.close()

    async def generate(self, prompt: Prompt, **fields: Unpack[GenerateFields]) -> Generation:
        return read(Generation, await self._transport.send(generate_call(prompt, fields)))

    def stream(self, prompt: Prompt, **fields: Unpack[GenerateFields]) -> AsyncGenerationStream:
        return AsyncGenerationStream(self._transport, stream_call(prompt, fields))

    async def score(self, inputs: Sequence[ScoreInput], **fields: Unpack[ScoreFields]) -> Scores:
        return read(Scores, await self._transport.send(score_call(inputs, fields)))

    async def cancel(self, request_id: str) -> None:
        await self._transport.send(ops.cancel_call(request_id))

    async def info(self) -> Info:
        return read(Info, await self._transport.send(ops.INFO))

    async def health(self) -> Health:
        return read(Health, await self._transport.send(ops.HEALTH))

    async def ready(self) -> Ready:
        return read(Ready, await self._transport.send(ops.READY))

    async def wait_until_ready(self, timeout_s: float = _READY_S) -> Ready:
        rules = RetryRules(None, timeout_s)
        return read(Ready, await self._transport.send(ops.READY_AT_LAST, rules))
