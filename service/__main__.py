"""The command line: ``gemma-service`` or ``python -m service``."""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from service import runtime
from service.data_directory import DataDirectory, DataDirectoryInUse
from service.logs import log_to_stderr
from service.settings import Settings
from service.startup_display import startup_display
from service.supervisor import LoadRefused
from service.version import VERSION

# BSD's sysexits, where it has a name for what went wrong.
_EXIT_USAGE = 64
_EXIT_BAD_PRESET = 65
_EXIT_CANNOT_CREATE = 73
_EXIT_TRY_LATER = 75
_EXIT_ADDRESS_IN_USE = 98

log = logging.getLogger(__name__)

_USAGE = """\
usage: gemma-service COMMAND [options]

commands:
  serve        load a preset and serve it over HTTP
               (gemma-service serve --help lists the options)

options:
  --help       show this text
  --version    show the version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    match words:
        case ["serve", *options]:
            return _serve(options)
        case ["--version"]:
            _say(f"gemma-service {VERSION}")
            return 0
        case ["--help" | "-h"]:
            _say(_USAGE.rstrip())
            return 0
        case []:
            return _fail(_USAGE.rstrip(), _EXIT_USAGE)
        case _:
            return _fail(
                f"gemma-service: unknown command {words[0][:40]!r}; try --help.", _EXIT_USAGE
            )


def _serve(options: list[str]) -> int:
    try:
        settings = CliApp.run(Settings, cli_args=options)
    except SystemExit as exit_:
        # argparse has said what is wrong, and ends with a status of its own.
        return _EXIT_USAGE if exit_.code else 0
    except ValidationError as error:
        return _fail(_explain(error), _EXIT_USAGE)
    except SettingsError as error:
        return _fail(f"gemma-service: {error}", _EXIT_USAGE)
    log_to_stderr(settings.log_level)
    _warn_of_unknown_variables()
    try:
        listener = runtime.bind(settings.host, settings.port)
    except OSError as error:
        return _fail(
            f"gemma-service: cannot listen on {settings.host}:{settings.port}: {error.strerror}. "
            "Choose another with --host and --port.",
            _EXIT_ADDRESS_IN_USE,
        )
    try:
        data = DataDirectory(settings.data_dir)
        settings.cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except DataDirectoryInUse as error:
        return _fail(f"gemma-service: {error}", _EXIT_TRY_LATER)
    except OSError as error:
        return _fail(
            f"gemma-service: cannot use {error.filename}: {error.strerror}. "
            "Set GEMMA_DATA_DIR and GEMMA_CACHE_DIR to folders that can be written.",
            _EXIT_CANNOT_CREATE,
        )
    host, port = listener.getsockname()[:2]
    _say(json.dumps({"event": "listening", "host": host, "port": port, "pid": os.getpid()}))
    try:
        asyncio.run(runtime.serve(settings, listener, startup_display()))
    except LoadRefused as refusal:
        return _fail(f"gemma-service: {refusal}", _EXIT_BAD_PRESET)
    finally:
        data.close()
    return 0


def _warn_of_unknown_variables() -> None:
    """A misspelt variable would otherwise have no effect and say nothing."""
    known = {f"GEMMA_{name.upper()}" for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.startswith("GEMMA_") and name not in known:
            log.warning("%s is not a setting; gemma-service serve --help lists them", name)


def _explain(error: ValidationError) -> str:
    lines = []
    for entry in error.errors(include_url=False, include_input=False):
        name = ".".join(str(part) for part in entry["loc"])
        option, variable = name.replace("_", "-"), f"GEMMA_{name.upper()}"
        lines.append(f"gemma-service: --{option} (or {variable}): {entry['msg']}")
    return "\n".join(lines)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _fail(line: str, status: int) -> int:
    sys.stderr.write(line + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
