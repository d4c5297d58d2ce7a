"""The command line: ``gemma-service`` or ``python -m service``."""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsError

from service import runtime
from service.adapters import AdapterFileUnreadable, open_adapters
from service.commands import COMMANDS, SHARED, Command
from service.data_directory import DataDirectory, DataDirectoryInUse
from service.exit_status import Exit, ExitStatus
from service.jobs.folders import Folders
from service.jobs.store import FILE_NAME, Store, StoreUnusable
from service.jobs.training import DataFiles
from service.logs import log_to_stderr
from service.settings import Settings
from service.startup_display import startup_display
from service.supervisor import LoadRefused
from service.version import VERSION

log = logging.getLogger(__name__)

_USAGE = """\
usage: gemma-service COMMAND [options]

commands:
  serve        load a preset and serve it over HTTP
  presets      list the presets: sizes, memory, and whether they are here
  fetch        download a preset and convert it
  export       write a preset as a Keras or Hugging Face directory
  finetune     train an adapter in a running service
  jobs         list, follow or cancel such jobs
  adapters     list adapters and their versions
               (gemma-service COMMAND --help lists the options)

options:
  --help       show this text
  --version    show the version
"""

_Options = TypeVar("_Options", bound=BaseSettings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except Exit as exit_:
        if exit_.line:
            sys.stderr.write(f"gemma-service: {exit_.line}\n")
        return exit_.status
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    except BrokenPipeError:
        # Who read our output has seen enough. Nothing may be written there at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.OK


def _run(words: list[str]) -> int:
    match words:
        case ["serve", *options]:
            _serve(_parsed(Settings, "serve", options))
        case [name, *options] if name in COMMANDS:
            _run_command(COMMANDS[name], name, options)
        case [("finetune" | "jobs" | "adapters") as name, *options]:
            # Not above: the HTTP library takes longer to load than all that serve needs until then.
            from service.client_commands import CLIENT_COMMANDS

            _run_command(CLIENT_COMMANDS[name], name, options)
        case ["--version"]:
            _say(f"gemma-service {VERSION}")
        case ["--help" | "-h"]:
            _say(_USAGE.rstrip())
        case []:
            sys.stderr.write(_USAGE)
            return ExitStatus.USAGE
        case _:
            raise Exit(ExitStatus.USAGE, f"unknown command {words[0][:40]!r}; try --help.")
    return ExitStatus.OK


def _run_command(kind: type[Command], name: str, options: list[str]) -> None:
    command = _parsed(kind, name, options)
    log_to_stderr(command.log_level)
    _warn_of_unknown_variables()
    command.run()
    sys.stdout.flush()


def _parsed(kind: type[_Options], command: str, options: list[str]) -> _Options:
    """Options and variables as settings. Raises `Exit`, also after a text that was asked for."""
    try:
        return CliApp.run(kind, cli_args=options)
    except SystemExit as exit_:
        # argparse has said what is wrong, and ends with a status of its own.
        raise Exit(ExitStatus.USAGE if exit_.code else ExitStatus.OK, "") from None
    except ValidationError as error:
        raise Exit(ExitStatus.USAGE, _explain(error, kind)) from error
    except SettingsError as error:
        problem = str(error).removeprefix("error parsing CLI: ")
        raise Exit(
            ExitStatus.USAGE, f"{command}: {problem}; try gemma-service {command} --help."
        ) from error


def _serve(settings: Settings) -> None:
    log_to_stderr(settings.log_level)
    _warn_of_unknown_variables()
    try:
        listener = runtime.bind(settings.host, settings.port)
    except OSError as error:
        raise Exit(
            ExitStatus.ADDRESS_IN_USE,
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}. "
            "Choose another with --host and --port.",
        ) from error
    try:
        data = DataDirectory(settings.data_dir)
        settings.cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        folders = Folders(settings.data_dir)
    except DataDirectoryInUse as error:
        raise Exit(ExitStatus.TRY_LATER, str(error)) from error
    except OSError as error:
        raise Exit(
            ExitStatus.CANNOT_CREATE,
            f"cannot use {error.filename}: {error.strerror}. "
            "Set GEMMA_DATA_DIR and GEMMA_CACHE_DIR to folders that can be written.",
        ) from error
    try:
        adapters = open_adapters(settings.adapter)
        store = Store(settings.data_dir / FILE_NAME)
    except (AdapterFileUnreadable, StoreUnusable) as error:
        raise Exit(ExitStatus.BAD_PRESET, str(error)) from error
    host, port = listener.getsockname()[:2]
    _say(json.dumps({"event": "listening", "host": host, "port": port, "pid": os.getpid()}))
    try:
        files = DataFiles(store, folders)
        asyncio.run(runtime.serve(settings, listener, startup_display(), adapters, files))
    except LoadRefused as refusal:
        raise Exit(ExitStatus.BAD_PRESET, str(refusal)) from refusal
    finally:
        store.close()
        data.close()


def _warn_of_unknown_variables() -> None:
    """A misspelt variable would otherwise have no effect and say nothing."""
    known = {f"GEMMA_{name.upper()}" for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.startswith("GEMMA_") and name not in known:
            log.warning("%s is not a setting; gemma-service serve --help lists them", name)


def _explain(error: ValidationError, kind: type[BaseSettings]) -> str:
    positionals: Sequence[str] = ()
    variables = {*kind.model_fields}
    if issubclass(kind, Command):
        positionals, variables = kind.positionals, variables & SHARED
    lines = []
    for entry in error.errors(include_url=False, include_input=False):
        name = ".".join(str(part) for part in entry["loc"])
        option = "--" + name.replace("_", "-")
        if name in positionals:
            option = name.upper()
        elif name in variables:
            option += f" (or GEMMA_{name.upper()})"
        lines.append(f"{option}: {entry['msg']}")
    return "\ngemma-service: ".join(lines)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
