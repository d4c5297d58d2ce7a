"""Builds the HTTP application. No module-level ``app``: tests build their own."""

from fastapi import FastAPI
from starlette.middleware import Middleware

from service.api import adapters, finetune, generate, ops, problems, requests, score
from service.api.state import ServiceState
from service.edge import edge_middleware
from service.observability import CountRequests
from service.version import VERSION

_DESCRIPTION = """\
Serves one Gemma preset. Errors are `application/problem+json` (RFC 9457), streams are server-sent
events, times are seconds.
"""


def create_app(state: ServiceState) -> FastAPI:
    """The application over one worker.

    Args:
        state: Everything that the routes use.
    """
    settings = state.settings
    app = FastAPI(
        title="Gemma service",
        description=_DESCRIPTION,
        version=VERSION,
        # A redirect would be built from the Host header, which a client chooses.
        redirect_slashes=False,
        openapi_url="/openapi.json" if settings.serves_docs else None,
        middleware=[
            Middleware(CountRequests, metrics=state.metrics),
            *edge_middleware(
                max_body_bytes=settings.body_bytes,
                max_job_bytes=settings.job_body_bytes,
                max_adapter_bytes=settings.adapter_body_bytes,
                max_held_bytes=settings.held_body_bytes,
                body_timeout_seconds=settings.body_timeout_seconds,
            ),
        ],
    )
    app.state.service = state
    app.include_router(generate.router)
    app.include_router(score.router)
    app.include_router(finetune.router)
    app.include_router(adapters.router)
    app.include_router(adapters.json_router)
    app.include_router(requests.router)
    app.include_router(ops.router)
    problems.install(app)
    return app
