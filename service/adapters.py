"""The models that are served, by name: the base, and versions of adapters.

::

    gemma          the base
    gemma:tone     the live version of the adapter "tone"
    gemma:tone@7   that version

A version is what its file's bytes are: its digest names it everywhere behind this module. Who asks
gets the digest at once and keeps it, wherever the name points later.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from service.errors import AdapterMismatch, ModelNotFound

ADAPTER_NAME = r"[a-z0-9][a-z0-9_-]{0,62}"
_PIECE_BYTES = 1 << 20
_VERSION = re.compile(rf"(?P<name>{ADAPTER_NAME})(@(?P<number>[1-9][0-9]{{0,8}}))?")


class AdapterFileUnreadable(Exception):
    """An adapter file cannot be opened; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One version of an adapter that can be asked for.

    Attributes:
        name: Of the adapter.
        number: Of the version.
        digest: Of its file.
        path: Of its file; None: it is in the worker's memory alone.
        preset_digest: Of the model that it belongs to; None: of the one that is served.
    """

    name: str
    number: int
    digest: str
    path: Path | None
    preset_digest: str | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a name stands for: ``adapter`` is a digest, or None for the base."""

    name: str
    adapter: str | None = None


class AdapterNames:
    """The versions that can be asked for, and which of each adapter is live.

    Args:
        versions: That are there from the beginning; the last of each adapter is live.
    """

    def __init__(self, versions: Iterable[AdapterVersion] = ()) -> None:
        self._versions: dict[tuple[str, int], AdapterVersion] = {}
        self._live: dict[str, int] = {}
        # Of the model that is served, once that is known.
        self.preset_digest: str | None = None
        for version in versions:
            self.put(version)
            self.set_live(version.name, version.number)

    @property
    def versions(self) -> tuple[AdapterVersion, ...]:
        """All of them."""
        return tuple(self._versions.values())

    def put(self, version: AdapterVersion) -> None:
        """It can be asked for from now on."""
        self._versions[version.name, version.number] = version

    def remove(self, name: str, number: int) -> None:
        """It cannot be asked for any more, if it could."""
        self._versions.pop((name, number), None)

    def set_live(self, name: str, number: int | None) -> None:
        """What the bare name stands for; None: nothing."""
        if number is None:
            self._live.pop(name, None)
        else:
            self._live[name] = number

    def live(self, name: str) -> int | None:
        """The live version of an adapter; None: it has none."""
        return self._live.get(name)

    def resolve(self, base: str, asked: str | None) -> ServedModel:
        """The model of a name; the base, whose name is ``base``, for None.

        Raises:
            ModelNotFound: Nothing has that name.
            AdapterMismatch: It is of another model.
        """
        if asked is None or asked == base:
            return ServedModel(base)
        served, _, wanted = asked.partition(":")
        version = self.find(wanted) if served == base else None
        if version is None:
            raise ModelNotFound("No model of that name is served here.")
        return ServedModel(f"{base}:{version.name}@{version.number}", version.digest)

    def find(self, wanted: str) -> AdapterVersion | None:
        """The version that ``tone`` or ``tone@7`` names; None if there is none.

        Raises:
            AdapterMismatch: It is of another model.
        """
        match = _VERSION.fullmatch(wanted)
        if match is None:
            return None
        number = int(match["number"]) if match["number"] else self._live.get(match["name"], 0)
        version = self._versions.get((match["name"], number))
        if version is not None and version.preset_digest not in (None, self.preset_digest):
            raise AdapterMismatch("The version was made for another model than the one served.")
        return version


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
    return AdapterNames(versions)


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
