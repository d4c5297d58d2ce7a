"""What a route must know of its client: what it can read, and whether it is still there."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from fastapi import Request, Response

from service.errors import NotAcceptable, ServiceError


def check_accept(request: Request, media_type: str) -> None:
    """Refuses a client that says it cannot read what it asked for."""
    accept = request.headers.get("accept")
    if accept is None:
        return
    ranges = {part.split(";")[0].strip().lower() for part in accept.split(",")}
    if not ranges & {media_type, media_type.split("/")[0] + "/*", "*/*"}:
        raise NotAcceptable(f"This request is answered as {media_type}; Accept does not allow it.")


async def answer_unless_left(
    request: Request, answering: Coroutine[Any, Any, Response]
) -> Response:
    """What ``answering`` makes; it is given up if the client leaves before."""
    working = asyncio.create_task(answering)
    leaving = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return Response(status_code=499)  # nobody reads it
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, ServiceError):
                await task


async def _disconnect(request: Request) -> None:
    """Returns when the client has left. Without this a handler would run on for nobody."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return
