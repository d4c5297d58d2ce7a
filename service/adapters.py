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
_PIECE_BYTES = 1 << 20
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
    """Of a file, or of the two of a directory of PEFT, one behind the other."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [path / name for name in names] if path.is_dir() else [path]
    digest = hashlib.sha256()
    try:
        for each in files:
            with each.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
    except OSError as error:
        raise AdapterFileUnreadable(
            f"cannot read the adapter {each}: {error.strerror}. Name a file or a directory of PEFT "
            "with --adapter."
        ) from error
    return f"sha256:{digest.hexdigest()}"
