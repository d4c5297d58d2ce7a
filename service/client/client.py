"""`GemmaClient` and, for asyncio, `AsyncGemmaClient`: one method for each thing the service does.

Neither has logic of its own. What is sent and how an answer is read stands in one file for each
resource (`generate`, `score`, `jobs`, `adapters`, `ops`); when it is sent again, in `retries`.
"""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self, Unpack

from service.client import adapters, jobs, ops
from service.client.adapters import (
    Adapter,
    AdapterList,
    AdapterSummary,
    FileFormat,
    PromoteFields,
    Version,
)
from service.client.call import read
from service.client.generate import (
    GenerateFields,
    Generation,
    Prompt,
    generate_call,
    stream_call,
)
from service.client.job import AsyncJob, Job
from service.client.jobs import DryRun, FinetuneFields, JobList, JobState
from service.client.ops import Health, Info, Ready
from service.client.retries import RetryRules
from service.client.score import ScoreFields, ScoreInput, Scores, read_scores, score_call
from service.client.streams import AsyncGenerationStream, GenerationStream
from service.client.training_data import TrainingData
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

    def generate(
        self, prompt: Prompt, *, request_id: str | None = None, **fields: Unpack[GenerateFields]
    ) -> Generation:
        """Continues one or several prompts; `GenerateFields` has the names of the rest.

        By the ``request_id`` that you give it, `cancel` ends it from elsewhere.
        """
        return read(Generation, self._transport.send(generate_call(prompt, fields, request_id)))

    def stream(self, prompt: Prompt, **fields: Unpack[GenerateFields]) -> GenerationStream:
        """The same as it comes.

        with client.stream("Once upon a time") as stream:
            for text in stream.text:
                print(text, end="", flush=True)
        """
        return GenerationStream(self._transport, stream_call(prompt, fields))

    def score(
        self,
        inputs: Sequence[ScoreInput],
        *,
        as_safetensors: bool = False,
        request_id: str | None = None,
        **fields: Unpack[ScoreFields],
    ) -> Scores:
        """How likely texts are; ``return_`` names what is told of each target.

        By the ``request_id`` that you give it, `cancel` ends it from elsewhere.
        ``as_safetensors`` is for answers with large tensors: their numbers come as they are, a
        quarter smaller than in base64.
        """
        call = score_call(inputs, fields, request_id, as_safetensors=as_safetensors)
        return read_scores(self._transport.send(call), as_safetensors=as_safetensors)

    def cancel(self, request_id: str) -> None:
        """Ends a running request, whose own answer then has what there was.

        Where there is nothing, as of scores, that answer is an error: ``request_cancelled``.
        """
        self._transport.send(ops.cancel_call(request_id))

    def finetune(
        self, data: TrainingData, *, adapter: str, **fields: Unpack[FinetuneFields]
    ) -> Job:
        """Starts a LoRA job, which gives ``adapter`` new versions.

            client.finetune("rows.jsonl", adapter="tone", epochs=3).watch()

        Args:
            data: Rows such as ``{"prompt": ..., "completion": ...}``, a data frame with such
                columns, or the path of a file with one such object a line.
            adapter: Its name; it is made if there is none.
            **fields: `FinetuneFields` has the names of the rest.
        """
        call = jobs.finetune_call(data, adapter, fields)
        return Job(self._transport, read(JobState, self._transport.send(call)))

    def dry_run(
        self, data: TrainingData, *, adapter: str, **fields: Unpack[FinetuneFields]
    ) -> DryRun:
        """What that job would take, and its first rows as tokens; nothing is kept."""
        call = jobs.dry_run_call(data, adapter, fields)
        return read(DryRun, self._transport.send(call))

    def job(self, job_id: str) -> Job:
        """A job that was started before, here or elsewhere."""
        return Job(self._transport, read(JobState, self._transport.send(jobs.job_call(job_id))))

    def jobs(self, *, limit: int = 20, after: str | None = None) -> list[Job]:
        """The newest jobs, newest first; ``after`` an id, those that are older than it."""
        page = read(JobList, self._transport.send(jobs.jobs_call(limit, after)))
        return [Job(self._transport, state) for state in page.jobs]

    def adapters(self) -> list[AdapterSummary]:
        """All adapters, with the version that is live."""
        return read(AdapterList, self._transport.send(adapters.LIST)).adapters

    def adapter(self, name: str, *, below: int | None = None, limit: int | None = None) -> Adapter:
        """An adapter with its newest versions, or the newest ``below`` a number."""
        return read(Adapter, self._transport.send(adapters.adapter_call(name, below, limit)))

    def version(self, name: str, version: int) -> Version:
        """A version with where it comes from."""
        return read(Version, self._transport.send(adapters.version_call(name, version)))

    def promote(self, name: str, version: int, **fields: Unpack[PromoteFields]) -> Adapter:
        """Makes a version live: the bare name stands for it from now on.

        With ``if_live`` only if that one is live now, or with None if none is; `Conflict` if not.
        """
        call = adapters.promote_call(name, version, fields)
        return read(Adapter, self._transport.send(call))

    def download(
        self,
        name: str,
        version: int,
        path: str | os.PathLike[str],
        *,
        format: FileFormat = "keras",
    ) -> None:
        """Writes a version to a file: ``.lora.h5`` of keras-hub, or safetensors for PEFT.

        Raises:
            OSError: It cannot be written.
        """
        self._transport.save(adapters.download_call(name, version, format), Path(path))

    def upload(
        self, name: str, path: str | os.PathLike[str], *, format: FileFormat = "keras"
    ) -> Version:
        """Makes a version of a file; it is live from then on.

        Raises:
            OSError: It cannot be read.
        """
        call = adapters.upload_call(name, Path(path).read_bytes(), format)
        return read(Version, self._transport.send(call))

    def delete_adapter(self, name: str, version: int | None = None) -> None:
        """Deletes an adapter, or one version of it. What runs with it may end."""
        self._transport.send(adapters.delete_call(name, version))

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

    async def generate(
        self, prompt: Prompt, *, request_id: str | None = None, **fields: Unpack[GenerateFields]
    ) -> Generation:
        call = generate_call(prompt, fields, request_id)
        return read(Generation, await self._transport.send(call))

    def stream(self, prompt: Prompt, **fields: Unpack[GenerateFields]) -> AsyncGenerationStream:
        return AsyncGenerationStream(self._transport, stream_call(prompt, fields))

    async def score(
        self,
        inputs: Sequence[ScoreInput],
        *,
        as_safetensors: bool = False,
        request_id: str | None = None,
        **fields: Unpack[ScoreFields],
    ) -> Scores:
        call = score_call(inputs, fields, request_id, as_safetensors=as_safetensors)
        return read_scores(await self._transport.send(call), as_safetensors=as_safetensors)

    async def cancel(self, request_id: str) -> None:
        await self._transport.send(ops.cancel_call(request_id))

    async def finetune(
        self, data: TrainingData, *, adapter: str, **fields: Unpack[FinetuneFields]
    ) -> AsyncJob:
        call = await asyncio.to_thread(jobs.finetune_call, data, adapter, fields)
        return AsyncJob(self._transport, read(JobState, await self._transport.send(call)))

    async def dry_run(
        self, data: TrainingData, *, adapter: str, **fields: Unpack[FinetuneFields]
    ) -> DryRun:
        call = await asyncio.to_thread(jobs.dry_run_call, data, adapter, fields)
        return read(DryRun, await self._transport.send(call))

    async def job(self, job_id: str) -> AsyncJob:
        return AsyncJob(
            self._transport, read(JobState, await self._transport.send(jobs.job_call(job_id)))
        )

    async def jobs(self, *, limit: int = 20, after: str | None = None) -> list[AsyncJob]:
        page = read(JobList, await self._transport.send(jobs.jobs_call(limit, after)))
        return [AsyncJob(self._transport, state) for state in page.jobs]

    async def adapters(self) -> list[AdapterSummary]:
        return read(AdapterList, await self._transport.send(adapters.LIST)).adapters

    async def adapter(
        self, name: str, *, below: int | None = None, limit: int | None = None
    ) -> Adapter:
        return read(Adapter, await self._transport.send(adapters.adapter_call(name, below, limit)))

    async def version(self, name: str, version: int) -> Version:
        return read(Version, await self._transport.send(adapters.version_call(name, version)))

    async def promote(self, name: str, version: int, **fields: Unpack[PromoteFields]) -> Adapter:
        call = adapters.promote_call(name, version, fields)
        return read(Adapter, await self._transport.send(call))

    async def download(
        self,
        name: str,
        version: int,
        path: str | os.PathLike[str],
        *,
        format: FileFormat = "keras",
    ) -> None:
        await self._transport.save(adapters.download_call(name, version, format), Path(path))

    async def upload(
        self, name: str, path: str | os.PathLike[str], *, format: FileFormat = "keras"
    ) -> Version:
        content = await asyncio.to_thread(Path(path).read_bytes)
        call = adapters.upload_call(name, content, format)
        return read(Version, await self._transport.send(call))

    async def delete_adapter(self, name: str, version: int | None = None) -> None:
        await self._transport.send(adapters.delete_call(name, version))

    async def info(self) -> Info:
        return read(Info, await self._transport.send(ops.INFO))

    async def health(self) -> Health:
        return read(Health, await self._transport.send(ops.HEALTH))

    async def ready(self) -> Ready:
        return read(Ready, await self._transport.send(ops.READY))

    async def wait_until_ready(self, timeout_s: float = _READY_S) -> Ready:
        rules = RetryRules(None, timeout_s)
        return read(Ready, await self._transport.send(ops.READY_AT_LAST, rules))
