"""The models that are served, by name: the base, and versions of adapters.

::

    gemma          the base
    gemma:tone     the live version of the adapter "tone"
    gemma:tone@1   that version

A version is what its file's bytes are: its digest names it everywhere behind this module.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.errors import ModelNotFound

ADAPTER_NAME = r"[a-z0-9][a-z0-9_-]{0,62}"
_VERSION = re.compile(rf"(?P<name>{ADAPTER_NAME})(@(?P<number>[1-9][0-9]{{0,8}}))?")


class AdapterFileUnreadable(Exception):
    """An adapter file cannot be opened; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One version of an adapter, and where it lies."""

    name: str
    number: int
    digest: str
    path: Path


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a name stands for: ``adapter`` is a digest, or None for the base."""

    name: str
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterNames:
    """The adapters that are there; the newest version of each is live."""

    versions: Sequence[AdapterVersion] = ()

    def resolve(self, base: str, asked: str | None) -> ServedModel:
        """The model of a name; the base, whose name is ``base``, for None.

        Raises:
            ModelNotFound: Nothing has that name.
        """
        if asked is None or asked == base:
            return ServedModel(base)
        served, _, wanted = asked.partition(":")
        match = _VERSION.fullmatch(wanted)
        if served == base and match is not None:
            number = match["number"] and int(match["number"])
            for version in reversed(self.versions):
                if version.name == match["name"] and number in (None, version.number):
                    return ServedModel(f"{base}:{version.name}@{version.number}", version.digest)
        raise ModelNotFound("No model of that name is served here.")


def open_adapters(given: Iterable[str]) -> AdapterNames:
    """Version 1 of each ``NAME=PATH``.

    Raises:
        AdapterFileUnreadable: One cannot be opened.
    """
    versions = []
    for each in given:
        name, _, path = each.partition("=")
        file = Path(path).absolute()
        versions.append(AdapterVersion(name, 1, _digest(file), file))
    return AdapterNames(tuple(versions))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise AdapterFileUnreadable(
            f"cannot read the adapter {path}: {error.strerror}. Name a file with --adapter."
        ) from error
