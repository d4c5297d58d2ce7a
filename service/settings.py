"""Every setting: its type, its default, its unit and one sentence.

Each is an option of ``gemma-service serve`` (``--queue-requests``) and a variable of the
environment (``GEMMA_QUEUE_REQUESTS``); the option wins. `docs/settings.md` lists them and a test
compares.
"""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.adapters import ADAPTER_NAME

_APPLICATION = "gemma-service"
_ADAPTER = rf"^{ADAPTER_NAME}=.+$"


def _xdg_directory(variable: str, fallback: str) -> Path:
    """The application's folder under an XDG base directory."""
    base = os.environ.get(variable) or str(Path.home() / fallback)
    return Path(base) / _APPLICATION


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Settings(BaseSettings):
    """Settings of one service."""

    model_config = SettingsConfigDict(
        env_prefix="GEMMA_",
        extra="forbid",
        allow_inf_nan=False,
        cli_prog_name="gemma-service serve",
        # A bad option is a SettingsError then, and no exit from within.
        cli_exit_on_error=False,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    preset: str = Field(
        "gemma3_270m",
        min_length=1,
        max_length=4096,
        description="What to serve: a built-in name, a Keras preset directory or a .gguf file.",
    )
    served_name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")] = Field(
        "gemma", description="Name of the base model in requests and answers."
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    slots: int = Field(8, ge=1, le=64, description="Sequences that are generated at once.")
    context_tokens: int = Field(
        4096, ge=16, le=1_048_576, description="Tokens of prompt and completion together."
    )
    queue_requests: int = Field(
        256, ge=1, le=65_536, description="Requests that may wait for a slot."
    )
    queue_tokens: int = Field(
        262_144, ge=1, le=16_777_216, description="Prompt tokens that may wait for a slot."
    )
    prefix_cache_bytes: int = Field(
        268_435_456,
        ge=0,
        le=1_099_511_627_776,
        description="Memory for blocks of prompts that later prompts begin with; 0 turns it off.",
    )
    kernels: Literal["auto", "native", "xla"] = Field(
        "auto",
        description="auto: native kernels where there are any; native: no start without; xla: no.",
    )
    adapter: list[Annotated[str, StringConstraints(pattern=_ADAPTER)]] = Field(
        default_factory=list,
        max_length=1024,
        description="NAME=PATH of a .lora.h5 file, a directory of PEFT or a .safetensors file, "
        "served as gemma:NAME; may be given repeatedly.",
    )
    adapter_slots: int = Field(
        16, ge=0, le=256, description="Adapters in memory at once; 0 serves the base alone."
    )
    adapter_max_rank: int = Field(16, ge=1, le=64, description="Highest rank of an adapter.")
    train_share: float = Field(
        0.4,
        ge=0,
        le=0.9,
        description="Share of the time that training gets while others are served.",
    )
    checkpoint_seconds: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="Seconds of training after which a job is saved; a crash costs no more.",
    )
    running_jobs: int = Field(8, ge=1, le=64, description="Fine-tune jobs that train at once.")
    queued_jobs: int = Field(16, ge=0, le=1024, description="Fine-tune jobs that may wait.")
    job_rows: int = Field(
        10_000, ge=1, le=100_000, description="Rows of a fine-tune job, validation included."
    )
    job_steps: int = Field(10_000, ge=1, le=1_000_000, description="Steps of a fine-tune job.")
    job_body_bytes: int = Field(
        16_777_216, ge=1024, le=16_777_216, description="Bytes of the body of a fine-tune job."
    )
    adapter_body_bytes: int = Field(
        67_108_864, ge=1024, le=268_435_456, description="Bytes of an adapter that is sent."
    )
    held_body_bytes: int = Field(
        268_435_456,
        ge=1024,
        le=2**40,
        description="Bytes of bodies beyond `body_bytes` that are held at once; one always is.",
    )
    request_timeout_seconds: float = Field(
        300.0, gt=0, le=3600, description="Seconds after which a request ends with what it has."
    )
    body_bytes: int = Field(
        1_048_576, ge=1024, le=16_777_216, description="Bytes of a request body."
    )
    body_timeout_seconds: float = Field(
        30.0, gt=0, le=3600, description="Seconds that a request body may take to arrive."
    )
    ping_seconds: float = Field(
        10.0, gt=0, le=3600, description="Seconds of silence after which a stream gets a comment."
    )
    stream_stall_seconds: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds that a client may take nothing of its answer before it is cut off.",
    )
    drain_seconds: float = Field(
        30.0, ge=0, le=3600, description="Seconds that running requests get when the service stops."
    )
    step_timeout_seconds: float = Field(
        120.0, gt=0, le=3600, description="Seconds after which a step of the worker counts as hung."
    )
    load_timeout_seconds: float = Field(
        1800.0,
        gt=0,
        le=86_400,
        description="Seconds without progress after which loading counts as hung.",
    )
    data_dir: Path = Field(
        default_factory=lambda: _xdg_directory("XDG_DATA_HOME", ".local/share"),
        description="Folder for what must last; one service at a time uses it.",
    )
    cache_dir: Path = Field(
        default_factory=lambda: _xdg_directory("XDG_CACHE_HOME", ".cache"),
        description="Folder for converted weights and compiled programs; may be deleted.",
    )
    engine: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] = Field(
        "model.engine:load", description="Engine that the worker loads, as module:function."
    )
    log_level: Annotated[
        str, StringConstraints(pattern=r"^(?i:DEBUG|INFO|WARNING|ERROR)$", to_upper=True)
    ] = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")
    docs: bool | None = Field(
        None,
        description="Whether to serve /docs and /openapi.json; left out: on loopback hosts only.",
    )

    @model_validator(mode="after")
    def _check_adapters(self) -> "Settings":
        names = [given.partition("=")[0] for given in self.adapter]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"--adapter names {twice[0]} twice")
        if names and not self.adapter_slots:
            raise ValueError("--adapter needs --adapter-slots of at least 1")
        return self

    @property
    def serves_docs(self) -> bool:
        """What ``docs`` says, or else whether only this machine can ask."""
        return self.docs if self.docs is not None else _is_loopback(self.host)
