"""What a route must know of its client: what it can read, and whether it is still there."""

import asyncio
import re
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any

from fastapi import Request, Response

from service.errors import NotAcceptable, ServiceError

_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


def check_accept(request: Request, media_type: str) -> None:
    """Refuses a client that says it cannot read what it asked for."""
    chosen_media_type(request, media_type)


def chosen_media_type(request: Request, *offered: str) -> str:
    """What the client would rather read of several media types; the first one if it is all one.

    Raises:
        NotAcceptable: It can read none of them.
    """
    accept = request.headers.get("accept")
    if accept is None:
        return offered[0]
    ranges = dict(map(_media_range, accept.split(",")))
    preferences = [_preference(ranges, media_type) for media_type in offered]
    quality, _ = best = max(preferences)
    if quality <= 0:
        types = " or ".join(offered)
        raise NotAcceptable(f"This request is answered as {types}; Accept does not allow it.")
    return offered[preferences.index(best)]


def _media_range(part: str) -> tuple[str, float]:
    """A range, and how much it is liked, 0 to 1."""
    media_range, *parameters = (each.strip().lower() for each in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "q":
            quality = float(value) if _QUALITY.fullmatch(value) else 0.0
    return media_range, quality


def _preference(ranges: Mapping[str, float], media_type: str) -> tuple[float, int]:
    """How much a type is liked, and how exactly it is named: the most exact range counts."""
    kind = media_type.partition("/")[0]
    for exactness, media_range in ((2, media_type), (1, f"{kind}/*"), (0, "*/*")):
        if media_range in ranges:
            return ranges[media_range], exactness
    return 0.0, 0


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
