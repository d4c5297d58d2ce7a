"""A route whose body is read as strict JSON, before FastAPI looks at it."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from service import strict_json


class StrictRequest(Request):
    """A request whose ``json()`` is the strict reading of its body, made once."""

    async def read(self) -> None:
        self._strict = strict_json.loads(await self.body())

    async def json(self) -> Any:
        return self._strict


class StrictRoute(APIRoute):
    """Use as ``APIRouter(route_class=StrictRoute)``.

    FastAPI calls ``request.json()`` inside a ``try`` that turns every exception into its own
    400, so the body is read ahead of it and a ``MalformedJson`` leaves from here.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_strictly(request: Request) -> Response:
            strict = StrictRequest(request.scope, request.receive)
            await strict.read()
            return await handle(strict)

        return handle_strictly
