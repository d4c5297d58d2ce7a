"""What a self-test found, kept beside the compiled programs that it was about.

A result holds for exact programs on one kind of machine. The folder is already apart for each
jaxlib, backend and processor (`model.programs`); a file in it is named by a digest of the rest.
Only success is kept: a failure is looked at again at every start.
"""

import hashlib
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import jax

from model.slots import SelfTest

# To be raised when `model.self_test` compares more, so that it runs again everywhere.
_FORMAT = 6
_MAX_BYTES = 4096

# Lines of /proc/cpuinfo, of x86-64 and of Arm.
_KIND_OF_PROCESSOR = (
    *("vendor_id", "cpu family", "model", "stepping", "cache size"),
    *("CPU implementer", "CPU variant", "CPU part", "CPU revision"),
)

_logger = logging.getLogger(__name__)


def claim_of(programs: Mapping[str, str], preset_digest: str, kernels: str) -> str:
    """The digest of all that the bits of these programs rest on.

    Args:
        programs: Name -> what XLA was asked to compile.
        preset_digest: Of the weights. They choose no instruction, but other numbers may show a
            rounding that these hide.
        kernels: What the programs call and do not contain.
    """
    facts = {
        "format": _FORMAT,
        "jax": jax.__version__,
        "programs": {name: _digest(text) for name, text in programs.items()},
        "preset": preset_digest,
        "kernels": kernels,
        # A product is cut to fit the caches, and shared out among threads.
        "processor": _processor(),
        "threads": _num_threads(),
        "environment": {name: os.environ.get(name) for name in ("NPROC", "XLA_FLAGS")},
    }
    return _digest(json.dumps(facts, sort_keys=True))


def kept_result(directory: Path, claim: str) -> SelfTest | None:
    """None if there is none, or its file is not whole: then the test is to run again."""
    path = _path(directory, claim)
    try:
        with path.open("rb") as file:
            stored = json.loads(file.read(_MAX_BYTES))
        if stored["claim"] != claim:
            raise ValueError("it is about other programs")
        return SelfTest(
            row_counts=_counts(stored["row_counts"]),
            chunk_tokens=_counts(stored["chunk_tokens"]),
            num_comparisons=_counts([stored["num_comparisons"]])[0],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _logger.warning("%s is damaged (%s); the self-test runs again.", path, error)
        return None


def keep_result(directory: Path, claim: str, result: SelfTest) -> None:
    """In one piece, as another worker may read it. A full disk only costs the next start a test."""
    path = _path(directory, claim)
    text = json.dumps({"claim": claim, **asdict(result)})
    try:
        with tempfile.TemporaryDirectory(prefix=".self_test_", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            temporary.write_text(text)
            temporary.replace(path)
    except OSError as error:
        _logger.warning("%s cannot be written (%s); the self-test runs again.", path, error)


def _path(directory: Path, claim: str) -> Path:
    return directory / f"self_test_{claim[:32]}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _counts(values: object) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError("a list of counts is missing")
    # Not isinstance: a bool is an int.
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("a count is no count")
    return tuple(values)


def _processor() -> list[str]:
    """What tells two kinds of processor apart that have the same features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
    return sorted({line for line in lines if line.startswith(_KIND_OF_PROCESSOR)})


def _num_threads() -> int | None:
    """As XLA counts them: a container may see fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
