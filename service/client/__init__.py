"""The Python client of the service. It needs httpx and pydantic, and nothing else of this package.

from service.client import GemmaClient
"""

from service.client.client import AsyncGemmaClient, GemmaClient
from service.client.errors import (
    Conflict,
    ConnectionFailed,
    ConnectionLost,
    FieldError,
    GemmaError,
    InvalidField,
    NotFound,
    RequestError,
    ServiceError,
    ServiceFailed,
    TimedOut,
    Unavailable,
    UnexpectedAnswer,
)
from service.client.generate import (
    DoneEvent,
    GenerateFields,
    Generation,
    GenerationEvent,
    Output,
    OutputEnd,
    Prompt,
    StartEvent,
    TokenEvent,
)
from service.client.ops import Health, Info, Ready
from service.client.residual_stream import Capture, Intervention, Vector, vector
from service.client.score import (
    ScoredTarget,
    ScoredToken,
    ScoreFields,
    ScoreInput,
    ScoreResult,
    Scores,
)
from service.client.streams import AsyncGenerationStream, GenerationStream

__all__ = [
    "AsyncGemmaClient",
    "AsyncGenerationStream",
    "Capture",
    "Conflict",
    "ConnectionFailed",
    "ConnectionLost",
    "DoneEvent",
    "FieldError",
    "GemmaClient",
    "GemmaError",
    "GenerateFields",
    "Generation",
    "GenerationEvent",
    "GenerationStream",
    "Health",
    "Info",
    "Intervention",
    "InvalidField",
    "NotFound",
    "Output",
    "OutputEnd",
    "Prompt",
    "Ready",
    "RequestError",
    "ScoreFields",
    "ScoreInput",
    "ScoreResult",
    "ScoredTarget",
    "ScoredToken",
    "Scores",
    "ServiceError",
    "ServiceFailed",
    "StartEvent",
    "TimedOut",
    "TokenEvent",
    "Unavailable",
    "UnexpectedAnswer",
    "Vector",
    "vector",
]
