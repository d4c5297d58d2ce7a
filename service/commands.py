"""The commands beside ``serve``: presets, fetch, export."""

import json
import sys
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import AliasChoices, Field, StringConstraints
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    CliPositionalArg,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from service.command_process import run_in_worker
from service.exit_status import Exit, ExitStatus
from service.preset_table import print_presets
from service.protocol.command_lines import Exported, Fetched, Listed
from service.settings import Settings

# Settings of the service that commands have, too, and that they mean the same by.
SHARED = frozenset({"cache_dir", "context_tokens", "log_level"})

_PresetName = Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class _SharedVariables(EnvSettingsSource):
    """The environment gives a command what it shares with the service, and nothing else."""

    def __call__(self) -> dict[str, Any]:
        found = super().__call__()
        return {name: found[name] for name in found if name in SHARED}


def shared(name: str) -> Any:
    """A setting that commands have in common with ``serve``."""
    return Settings.model_fields[name]


class Command(BaseSettings):
    """What every command takes."""

    model_config = SettingsConfigDict(
        env_prefix="GEMMA_",
        extra="forbid",
        # A bad option is a SettingsError then, and no exit from within.
        cli_exit_on_error=False,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    # Names of arguments that are no options.
    positionals: ClassVar[tuple[str, ...]] = ()

    log_level: str = shared("log_level")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, _SharedVariables(settings_cls))

    @abstractmethod
    def run(self) -> None:
        """Does it, and prints the results. Raises `Exit`."""


class _PresetCommand(Command):
    """What is done with files of models."""

    cache_dir: Path = shared("cache_dir")


class Presets(_PresetCommand):
    """Lists the presets that have a name: sizes, memory, and whether they are here."""

    model_config = SettingsConfigDict(cli_prog_name="gemma-service presets")

    as_json: CliImplicitFlag[bool] = Field(
        False,
        validation_alias=AliasChoices("json"),
        description="Print one JSON object a line, with sizes in bytes.",
    )
    context_tokens: int = shared("context_tokens")

    def run(self) -> None:
        words = ["presets", "--cache-dir", str(self.cache_dir)]
        results = run_in_worker(
            [*words, "--context-tokens", str(self.context_tokens)], self.log_level
        )
        presets = [result for result in results if isinstance(result, Listed)]
        if not self.as_json:
            print_presets(presets, sys.stdout)
            return
        for preset in presets:
            facts = msgspec.structs.asdict(preset)
            sys.stdout.write(json.dumps(facts) + "\n")


class Fetch(_PresetCommand):
    """Downloads a preset and converts it, so that it is served at once and without a network."""

    model_config = SettingsConfigDict(cli_prog_name="gemma-service fetch")
    positionals = ("name",)

    name: CliPositionalArg[_PresetName] = Field(
        description="A name that `gemma-service presets` lists, "
        "kaggle://owner/model/framework/variation[/version] or hf://owner/name[@revision]; "
        "a directory or a .gguf file is converted.",
    )

    def run(self) -> None:
        _make_cache_directory(self.cache_dir)
        words = ["fetch", "--cache-dir", str(self.cache_dir), "--", self.name]
        for result in run_in_worker(words, self.log_level):
            if isinstance(result, Fetched):
                state = "was here already" if result.was_here else "is here now"
                sys.stdout.write(
                    f"{self.name} {state}, ready to be served\n"
                    f"files      {result.num_bytes:,} bytes in {result.directory}\n"
                    f"converted  {result.converted_bytes:,} bytes in {result.converted_directory}\n"
                )


class Export(_PresetCommand):
    """Writes a preset, an adapter, or both as one, for other programs."""

    model_config = SettingsConfigDict(cli_prog_name="gemma-service export")
    positionals = ("source", "directory")

    source: CliPositionalArg[_PresetName] = Field(
        description="What to export: whatever `serve` and `fetch` take.",
    )
    directory: CliPositionalArg[Path] = Field(
        description="A directory that does not exist yet; a new .lora.h5 file for an adapter "
        "of keras-hub.",
    )
    format: Literal["keras", "hugging-face", "peft"] = Field(
        description="keras: for keras-hub, a preset or the .lora.h5 file of an adapter; "
        "hugging-face: safetensors for transformers; peft: an adapter alone.",
    )
    adapter: _PresetName | None = Field(
        None,
        description="An adapter for SOURCE, alone or --merged: a path or NAME=PATH, as serve "
        "takes it.",
    )
    merged: CliImplicitFlag[bool] = Field(
        False, description="Add the adapter to the weights and write the whole preset."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Of the stored weights; bfloat16 halves the size and rounds what is finer.",
    )

    def _adapter_words(self) -> list[str]:
        """What is said of an adapter. Raises `Exit` if it cannot be done."""
        if self.adapter is None:
            if self.merged or self.format == "peft":
                raise Exit(ExitStatus.USAGE, "--merged and --format peft need an --adapter.")
            return []
        name, is_named, path = self.adapter.partition("=")
        words = ["--adapter", str(Path(path if is_named else name).absolute())]
        if self.merged:
            if self.format == "peft":
                raise Exit(ExitStatus.USAGE, "--format peft writes an adapter that is not merged.")
            return [*words, "--merged"]
        if self.format == "hugging-face":
            raise Exit(
                ExitStatus.USAGE,
                "--format hugging-face writes a whole preset: add --merged, or take --format peft.",
            )
        if self.format == "keras" and not self.directory.name.endswith(".lora.h5"):
            raise Exit(ExitStatus.USAGE, "the name of keras-hub's adapter file ends in .lora.h5.")
        return words

    def run(self) -> None:
        of_adapter = self._adapter_words()
        # Before anything is downloaded or converted.
        if self.directory.is_symlink() or self.directory.exists():
            raise Exit(
                ExitStatus.CANNOT_CREATE,
                f"{self.directory} exists already; name a new directory.",
            )
        _make_cache_directory(self.cache_dir)
        words = ["export", "--cache-dir", str(self.cache_dir)]
        words += ["--format", self.format, "--dtype", self.dtype, *of_adapter]
        words += ["--", self.source, str(self.directory)]
        for result in run_in_worker(words, self.log_level):
            if isinstance(result, Exported):
                sys.stdout.write(
                    f"{self.directory}: {result.num_files} files, {result.num_bytes:,} bytes\n"
                )


COMMANDS: dict[str, type[Command]] = {"presets": Presets, "fetch": Fetch, "export": Export}


def _make_cache_directory(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise Exit(
            ExitStatus.CANNOT_CREATE,
            f"cannot use {error.filename}: {error.strerror}. Set GEMMA_CACHE_DIR to a folder that "
            "can be written.",
        ) from error
