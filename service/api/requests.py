"""DELETE /requests/{id}: ends a running request from outside."""

from fastapi import APIRouter, Response

from service.api.state import State
from service.errors import (
    Loading,
    RequestNotFound,
    WorkerRestarting,
    error_responses,
)

router = APIRouter()


@router.delete(
    "/requests/{id}",
    status_code=204,
    response_class=Response,
    responses=error_responses(RequestNotFound, Loading, WorkerRestarting),
)
async def cancel(id: str, state: State) -> Response:
    """Frees what the request holds at the next step; the id is that of its answer, or its own
    `X-Request-Id`, and then of all that have this one.

    Its own answer ends with what was generated, and `finish_reason` `cancelled`. Scores, and what
    nothing was generated of, end with 409 `request_cancelled`.
    """
    if not state.worker.cancel(id):
        raise RequestNotFound("No request with that id is running.")
    return Response(status_code=204)
