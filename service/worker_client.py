"""The API process's side of the wall: send a command, follow one request's events."""

import asyncio
from collections.abc import Callable
from typing import assert_never

from service.errors import ERROR_BY_CODE, FieldError, InternalError, ServiceError
from service.protocol.messages import (
    Accepted,
    Cancel,
    Command,
    Failed,
    Finished,
    Generate,
    Piece,
    RequestEvent,
    Score,
    Scored,
)


class Generation:
    """One admitted request. Call `next_pieces` until it returns none; `close` it when done."""

    def __init__(
        self,
        accepted: Accepted,
        inbox: "asyncio.Queue[RequestEvent]",
        release: Callable[[str, bool], None],
    ) -> None:
        self.accepted = accepted
        self.finished: Finished | None = None
        self._inbox = inbox
        self._release = release
        self._error: ServiceError | None = None
        self._running = True

    @property
    def is_running(self) -> bool:
        """Whether the worker may still work on it."""
        return self._running

    async def next_pieces(self) -> list[Piece]:
        """Everything that has arrived, waiting for at least one piece; empty after the last.

        A reader that comes seldom gets more at once, so it never holds anybody else up. Whoever
        gives up waiting and calls it again misses nothing: it waits only while it has no piece.

        Raises:
            ServiceError: The request failed on the way; pieces before that were returned.
        """
        pieces: list[Piece] = []
        while self._running and (not pieces or not self._inbox.empty()):
            event = await self._inbox.get()
            match event:
                case Piece():
                    pieces.append(event)
                case Finished():
                    self._running, self.finished = False, event
                case Failed():
                    self._running, self._error = False, service_error(event)
                case Accepted() | Scored():
                    raise AssertionError(f"{type(event)} in the middle of a generation")
                case _ as unreachable:
                    assert_never(unreachable)
        if not pieces and self._error is not None:
            raise self._error
        return pieces

    def close(self) -> None:
        """Cancels the request if it is still running. May be called twice.

        Not a coroutine on purpose: when a client hangs up, this runs inside a cancelled anyio
        scope, where the first ``await`` raises and the Cancel would never be sent.
        """
        self._release(self.accepted.request_id, self._running)
        self._running = False


class Scoring:
    """One admitted request of scores; `close` it when done."""

    def __init__(
        self,
        accepted: Accepted,
        inbox: "asyncio.Queue[RequestEvent]",
        release: Callable[[str, bool], None],
    ) -> None:
        self.accepted = accepted
        self._inbox = inbox
        self._release = release
        self._running = True

    @property
    def is_running(self) -> bool:
        """Whether the worker may still work on it."""
        return self._running

    async def scored(self) -> Scored:
        """Waits for the scores.

        Raises:
            ServiceError: The request failed.
        """
        event = await self._inbox.get()
        self._running = False
        match event:
            case Scored():
                return event
            case Failed():
                raise service_error(event)
            case _:
                raise AssertionError(f"expected Scored or Failed, got {type(event)}")

    def close(self) -> None:
        """Cancels the request if it is still running; see `Generation.close`."""
        self._release(self.accepted.request_id, self._running)
        self._running = False


class WorkerClient:
    """Routes the worker's one stream of events to the requests they are about.

    Args:
        send: Takes one command; raises a `ServiceError` while no worker is ready.
    """

    def __init__(self, send: Callable[[Command], None]) -> None:
        self._send = send
        self._inboxes: dict[str, asyncio.Queue[RequestEvent]] = {}
        self._adapters: dict[str, set[str]] = {}
        # What those who sent them call them.
        self._own_names: dict[str, str] = {}

    @property
    def num_in_flight(self) -> int:
        """Requests sent to the worker and not yet closed."""
        return len(self._inboxes)

    def uses(self, adapter: str) -> bool:
        """Whether a request in flight runs with the adapter of that digest."""
        return any(adapter in used for used in self._adapters.values())

    async def start(self, command: Generate, own_name: str | None = None) -> Generation:
        """Sends ``command`` and waits until the worker admits it.

        Args:
            command: The request.
            own_name: What whoever sent it calls it.

        Raises:
            ServiceError: The worker refused it, or there is none; the subclass says why.
        """
        return Generation(*await self._admitted(command, own_name), self._close)

    async def score(self, command: Score, own_name: str | None = None) -> Scoring:
        """The same for scores."""
        return Scoring(*await self._admitted(command, own_name), self._close)

    async def _admitted(
        self, command: Generate | Score, own_name: str | None
    ) -> "tuple[Accepted, asyncio.Queue[RequestEvent]]":
        self._send(command)
        inbox: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self._inboxes[command.request_id] = inbox
        versions = command.versions if isinstance(command, Score) else (command.adapter,)
        if used := {digest for digest in versions if digest is not None}:
            self._adapters[command.request_id] = used
        if own_name is not None:
            self._own_names[command.request_id] = own_name
        try:
            first = await inbox.get()
        except BaseException:
            self._close(command.request_id, still_running=True)
            raise
        match first:
            case Accepted():
                return first, inbox
            case Failed():
                self._close(command.request_id, still_running=False)
                raise service_error(first)
            case _:
                raise AssertionError(f"expected Accepted or Failed first, got {type(first)}")

    def cancel(self, request_id: str) -> bool:
        """Asks the worker to end a request, which still gets its end; False if none has that id.

        By the name that those who sent them gave to several, all of these.

        Raises:
            ServiceError: There is no worker at the moment.
        """
        named = [request_id] if request_id in self._inboxes else []
        named += [each for each, name in self._own_names.items() if name == request_id]
        for each in named:
            self._send(Cancel(each))
        return bool(named)

    def deliver(self, event: RequestEvent) -> None:
        """Hands one event to the request it is about, if anyone still waits."""
        if inbox := self._inboxes.get(event.request_id):
            inbox.put_nowait(event)

    def fail_all(self, code: str, detail: str) -> None:
        """Ends every open request, as the worker no longer can."""
        for request_id, inbox in self._inboxes.items():
            inbox.put_nowait(Failed(request_id, code, detail))

    def _close(self, request_id: str, still_running: bool) -> None:
        was_open = self._inboxes.pop(request_id, None) is not None
        self._adapters.pop(request_id, None)
        self._own_names.pop(request_id, None)
        if not (was_open and still_running):
            return
        try:
            self._send(Cancel(request_id))
        except ServiceError:
            return  # no worker, so nothing runs


def service_error(failed: Failed) -> ServiceError:
    """The exception that a `Failed` event stands for."""
    error = ERROR_BY_CODE.get(failed.code, InternalError)
    errors = () if failed.pointer is None else (FieldError(failed.pointer, failed.detail),)
    return error(failed.detail, errors=errors, retry_after_seconds=failed.retry_after_seconds)
