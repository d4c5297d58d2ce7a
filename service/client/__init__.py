"""The Python client of the service. It needs httpx and pydantic, and nothing else of this package.

from service.client import GemmaClient
"""

from service.client.adapters import Adapter, AdapterSummary, Version
from service.client.client import AsyncGemmaClient, GemmaClient
from service.client.errors import (
    Conflict,
    ConnectionFailed,
    ConnectionLost,
    DataUnreadable,
    FieldError,
    GemmaError,
    InvalidField,
    JobFailed,
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
from service.client.job import AsyncJob, Job
from service.client.job_events import (
    EvalEvent,
    JobDoneEvent,
    JobEvent,
    JobFailedEvent,
    StatusEvent,
    StepEvent,
    VersionEvent,
)
from service.client.jobs import DryRun, FinetuneFields, JobState
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
from service.client.training_data import TrainingData

__all__ = [
    "Adapter",
    "AdapterSummary",
    "AsyncGemmaClient",
    "AsyncGenerationStream",
    "AsyncJob",
    "Capture",
    "Conflict",
    "ConnectionFailed",
    "ConnectionLost",
    "DataUnreadable",
    "DoneEvent",
    "DryRun",
    "EvalEvent",
    "FieldError",
    "FinetuneFields",
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
    "Job",
    "JobDoneEvent",
    "JobEvent",
    "JobFailed",
    "JobFailedEvent",
    "JobState",
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
    "StatusEvent",
    "StepEvent",
    "TimedOut",
    "TokenEvent",
    "TrainingData",
    "Unavailable",
    "UnexpectedAnswer",
    "Vector",
    "Version",
    "VersionEvent",
    "vector",
]
