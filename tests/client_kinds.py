"""The asynchronous client called as if it were the other one, so that one test is about both."""

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from service.client import (
    AsyncGemmaClient,
    AsyncGenerationStream,
    AsyncJob,
    GemmaClient,
    GenerationStream,
)
from service.client.call import Call
from service.client.retries import RetryRules
from service.client.transport import AsyncTransport, Transport

Kind = Literal["blocking", "asyncio"]
KINDS: tuple[Kind, ...] = ("blocking", "asyncio")


class Blocking:
    """Each call of the asynchronous object runs to its end in a loop that stands still between."""

    def __init__(self, inner: Any, runner: asyncio.Runner) -> None:
        self._inner = inner
        self._run = runner.run
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if hasattr(found, "__anext__"):
            return self._iterate(found)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            result = found(*args, **kwargs)
            if inspect.iscoroutine(result):
                return self._of_jobs(self._run(result))
            return Blocking(result, self._runner)

        return call

    def _of_jobs(self, result: Any) -> Any:
        if isinstance(result, AsyncJob):
            return Blocking(result, self._runner)
        if isinstance(result, list):
            return [self._of_jobs(each) for each in result]
        return result

    def __enter__(self) -> "Blocking":
        self._run(self._inner.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._run(self._inner.__aexit__(*error))

    def __iter__(self) -> Iterator[Any]:
        return self._iterate(aiter(self._inner))

    def _iterate(self, iterator: Any) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(iterator)

        while True:
            try:
                item = self._run(following())
            except StopAsyncIteration:
                return
            yield item


@contextlib.contextmanager
def open_client(kind: Kind, url: str, **options: Any) -> Iterator[Any]:
    """A client of that kind, with the methods of `GemmaClient`."""
    with contextlib.ExitStack() as stack:
        if kind == "blocking":
            yield stack.enter_context(GemmaClient(url, **options))
        else:
            runner = stack.enter_context(asyncio.Runner())
            yield stack.enter_context(Blocking(AsyncGemmaClient(url, **options), runner))


class FakeClock:
    """Time that passes only in ``sleep``, which notes how long it was asked to."""

    def __init__(self, on_sleep: Callable[[], None] = lambda: None) -> None:
        self.slept: list[float] = []
        self._on_sleep = on_sleep

    def now(self) -> float:
        return sum(self.slept)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._on_sleep()

    async def sleep_in_loop(self, seconds: float) -> None:
        self.sleep(seconds)


@dataclass(frozen=True)
class Sender:
    """What a client sends with, on a clock of the test's."""

    send: Callable[..., bytes]
    stream: Callable[[Call], Any]


@contextlib.contextmanager
def open_sender(kind: Kind, url: str, rules: RetryRules, clock: FakeClock) -> Iterator[Sender]:
    """Of a client of that kind."""
    with contextlib.ExitStack() as stack:
        if kind == "blocking":
            transport = Transport(url, rules, clock=clock.now, sleep=clock.sleep)
            stack.callback(transport.close)
            yield Sender(transport.send, lambda call: GenerationStream(transport, call))
        else:
            runner = stack.enter_context(asyncio.Runner())
            waiting = AsyncTransport(url, rules, clock=clock.now, sleep=clock.sleep_in_loop)
            stack.callback(lambda: runner.run(waiting.close()))
            send = Blocking(waiting, runner).send
            yield Sender(send, lambda call: Blocking(AsyncGenerationStream(waiting, call), runner))
