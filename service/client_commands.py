"""The commands that talk to a running service: finetune, jobs, adapters.

They are the Python client with options. A job belongs to the service: Ctrl-C ends the view of it,
and says how to see it again and how to end it.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, StringConstraints
from pydantic_settings import CliImplicitFlag, CliPositionalArg, SettingsConfigDict

from service.client import (
    DataUnreadable,
    FieldError,
    GemmaClient,
    GemmaError,
    InvalidField,
    Job,
    JobFailed,
    RequestError,
)
from service.client.client import DEFAULT_URL
from service.client_output import (
    how_far,
    print_adapters,
    print_dry_run,
    print_jobs,
    print_json,
    print_result,
    print_versions,
    view_of_command,
)
from service.commands import Command
from service.exit_status import Exit, ExitStatus

_ROWS = ("data", "validation")
_PUBLISH = "^(end|every_step|never|[1-9][0-9]{0,6})$"
_BOUND = r"^(init|[0-9]{1,6}(\.[0-9]{1,6})?)$"
_Target = Literal[
    "query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"
]


class _ClientCommand(Command):
    """What every command takes that talks to a service."""

    url: str = Field(DEFAULT_URL, description="Address of the service.")

    @contextlib.contextmanager
    def _client(self) -> Iterator[GemmaClient]:
        """What goes wrong in the block ends the program with one line."""
        try:
            client = GemmaClient(self.url)
        except ValueError as error:
            raise Exit(ExitStatus.USAGE, f"--url: {error}") from error
        try:
            with client:
                yield client
        except GemmaError as error:
            raise _exit_of(error) from error

    def _watch(self, job: Job) -> None:
        """Shows a job to its end and prints what came of it."""
        try:
            job.watch(view_of_command(sys.stderr))
        except KeyboardInterrupt:
            raise Exit(ExitStatus.INTERRUPTED, self._how_to_go_on(job)) from None
        if job.status != "succeeded":
            raise Exit(ExitStatus.JOB_FAILED, f"{job.id} was {job.status} {how_far(job.state)}.")
        print_result(job.state, sys.stdout)

    def _how_to_go_on(self, job: Job) -> str:
        where = "" if self.url == DEFAULT_URL else f" --url {self.url}"
        command = f"gemma-service jobs {job.id}{where}"
        return f"{job.id} goes on. To see it: {command} --follow; to end it: {command} --cancel"


class Finetune(_ClientCommand):
    """Trains an adapter in a running service, and shows how far it is."""

    model_config = SettingsConfigDict(cli_prog_name="gemma-service finetune")

    file: Path = Field(
        description="Rows, one JSON object a line: text; prompt and completion; messages; or "
        "token_ids, with or without loss_mask."
    )
    adapter: str = Field(description="Name of the adapter that gets the versions.")
    validation: str | None = Field(
        None, description="Rows to measure the loss on: a file, or the share of FILE set apart."
    )
    init: str | None = Field(None, description="Version to go on from, such as tone@7.")
    layout: Literal["keras", "peft"] | None = Field(None, description="Of the pairs. [keras]")
    rank: int | None = Field(None, description="Of each pair. [8]")
    alpha: float | None = Field(None, description="What is added is times alpha / rank. [rank]")
    targets: list[_Target] | None = Field(
        None, description="Projections that are adapted, with commas between. [query,value]"
    )
    epochs: int | None = Field(None, description="How often each row is seen. [1]")
    steps: int | None = Field(None, description="Steps of the optimizer, in place of epochs.")
    batch_size: int | None = Field(None, description="Rows of a step. [8]")
    learning_rate: float | None = Field(None, description="At its highest. [0.0002]")
    schedule: Literal["constant", "linear", "cosine"] | None = Field(
        None, description="Of the learning rate. [constant]"
    )
    warmup_steps: int | None = Field(None, description="In which the rate rises from 0. [0]")
    weight_decay: float | None = Field(None, description="Of AdamW. [0]")
    grad_clip: float | None = Field(None, description="Greatest norm of the gradient. [1]")
    max_length: int | None = Field(None, description="Tokens of a row. [512]")
    seed: int | None = Field(None, description="Of the first A and the order of rows. [0]")
    publish: Annotated[str, StringConstraints(pattern=_PUBLISH)] | None = Field(
        None,
        description="When a version is made: end, every_step, never; 10: each ten steps. [end]",
    )
    promote_below: Annotated[str, StringConstraints(pattern=_BOUND)] | None = Field(
        None,
        description="A version becomes live if its validation loss is below this; init: below "
        "what it was before the first step.",
    )
    dry_run: CliImplicitFlag[bool] = Field(
        False, description="Only tell what the job would take, and its first rows as tokens."
    )
    detach: CliImplicitFlag[bool] = Field(
        False, description="Start the job, print its id, and leave it alone."
    )

    def run(self) -> None:
        with self._client() as client:
            fields = self._fields()
            if self.dry_run:
                told = client.dry_run(self.file, adapter=self.adapter, **fields)
                print_dry_run(told, sys.stdout)
                return
            job = client.finetune(self.file, adapter=self.adapter, **fields)
            if self.detach:
                sys.stdout.write(f"{job.id}\n")
                return
            self._watch(job)

    def _fields(self) -> Any:
        """Those that were given; what the others are is for the service to say."""
        told = self.model_dump(
            exclude_none=True,
            exclude={"log_level", "url", "file", "adapter", "dry_run", "detach"},
        )
        if self.validation is not None:
            told["validation"] = _share_or_path(self.validation)
        if self.publish is not None and self.publish.isdecimal():
            told["publish"] = {"every": int(self.publish)}
        if (bound := told.pop("promote_below", None)) is not None:
            less_than = bound if bound == "init" else float(bound)
            told["promote"] = {"metric": "valid_loss", "less_than": less_than}
        return told


class Jobs(_ClientCommand):
    """Lists the newest jobs of a service; or shows, follows or cancels one."""

    model_config = SettingsConfigDict(cli_prog_name="gemma-service jobs")
    positionals = ("id",)

    id: CliPositionalArg[str] = Field("", description="Of one job.")
    follow: CliImplicitFlag[bool] = Field(False, description="Show the job until it has ended.")
    cancel: CliImplicitFlag[bool] = Field(False, description="End the job.")
    limit: int = Field(20, description="Jobs of the list.")
    as_json: CliImplicitFlag[bool] = Field(
        False, validation_alias=AliasChoices("json"), description="One JSON object a line."
    )

    def run(self) -> None:
        if not self.id and (self.follow or self.cancel):
            raise Exit(ExitStatus.USAGE, "--follow and --cancel need the ID of a job.")
        with self._client() as client:
            jobs = [client.job(self.id)] if self.id else client.jobs(limit=self.limit)
            if self.cancel:
                jobs[0].cancel()
            if self.follow:
                self._watch(jobs[0])
            elif self.as_json:
                print_json([job.state for job in jobs], sys.stdout)
            else:
                print_jobs([job.state for job in jobs], sys.stdout)


class Adapters(_ClientCommand):
    """Lists the adapters of a service, or the versions of one."""

    model_config = SettingsConfigDict(cli_prog_name="gemma-service adapters")
    positionals = ("name",)

    name: CliPositionalArg[str] = Field("", description="Of one adapter.")
    as_json: CliImplicitFlag[bool] = Field(
        False, validation_alias=AliasChoices("json"), description="One JSON object a line."
    )

    def run(self) -> None:
        with self._client() as client:
            if not self.name:
                summaries = client.adapters()
                if self.as_json:
                    print_json(summaries, sys.stdout)
                else:
                    print_adapters(summaries, sys.stdout)
                return
            adapter = client.adapter(self.name)
            if self.as_json:
                print_json(adapter.versions, sys.stdout)
            else:
                print_versions(adapter, sys.stdout)


CLIENT_COMMANDS: dict[str, type[Command]] = {
    "finetune": Finetune,
    "jobs": Jobs,
    "adapters": Adapters,
}


def _share_or_path(text: str) -> float | Path:
    try:
        return float(text)
    except ValueError:
        return Path(text)


def _exit_of(error: GemmaError) -> Exit:
    """One line, and the status that says what to do about it."""
    match error:
        case JobFailed():
            return Exit(ExitStatus.JOB_FAILED, str(error))
        case DataUnreadable():
            return Exit(ExitStatus.BAD_PRESET, str(error))
        case InvalidField(errors=errors) if errors:
            is_of_data = all(_field(each) in _ROWS for each in errors)
            status = ExitStatus.BAD_PRESET if is_of_data else ExitStatus.USAGE
            return Exit(status, "; ".join(map(_as_option, errors)))
        case RequestError():
            return Exit(ExitStatus.USAGE, str(error))
        case _:
            return Exit(ExitStatus.UNAVAILABLE, str(error))


def _field(error: FieldError) -> str:
    return error.pointer.split("/")[1] if "/" in error.pointer else ""


def _as_option(error: FieldError) -> str:
    """``--rank should be at most 16``; a row is named by its line instead."""
    field = _field(error)
    if field in _ROWS:
        return error.detail if "line" in error.detail else f"{error.pointer}: {error.detail}"
    option = "promote-below" if field == "promote" else field.replace("_", "-")
    return f"--{option}: {error.detail}"
