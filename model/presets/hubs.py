"""Presets from Kaggle and Hugging Face, as directories that the readers of presets can open.

Life of a download, ``<cache_dir>/downloads/<hub>/...``: made by `hub_download`, one process at a
time; ``.complete.json`` is written last. From then on the directory is served without a question
to the hub if its handle names a version or commit, and otherwise after one small question, which
version is the newest. Nothing here removes it.

Only the files that the readers use are fetched, and all of them are regular files.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.errors import PresetDownloadFailed, PresetError, PresetNotFound
from model.presets.hub_download import Download, synced
from model.presets.hub_handles import Handle, KaggleHandle, parse_handle
from model.presets.hub_process import HubProcess
from model.presets.table import BUILTIN_PRESETS
from model.presets.transfer import Problem
from model.progress import Progress, no_progress

_MARKER = ".complete.json"

_logger = logging.getLogger(__name__)


def fetch(handle: str, cache_dir: Path, progress: Progress = no_progress) -> Path:
    """The directory with the preset of that handle, downloaded unless it is there already.

    Any number of processes may ask for the same at once; one downloads and the others wait.

    Args:
        handle: ``kaggle://owner/model/framework/variation[/version]`` or
            ``hf://owner/name[@revision]``.
        cache_dir: Downloads are kept below it, in ``downloads``.
        progress: Told about bytes as they arrive.

    Raises:
        PresetNotFound: The handle is malformed, or the hub has nothing under it.
        PresetFileMissing, PresetFileInvalid: What is there is no preset, or its config or index
            is malformed.
        UnsupportedPreset: Its config describes something that is not served.
        PresetDownloadFailed: The hub refuses or cannot be reached, or sends damaged files, or the
            disk is full.
    """
    parsed = parse_handle(handle)
    if parsed.is_pinned and (cached := cached_directory(handle, cache_dir)) is not None:
        return cached
    downloads = cache_dir / "downloads"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with HubProcess(parsed, downloads) as hub:
            return _fetch(hub, parsed, cache_dir, progress)
    except Problem as problem:
        raise _explained(problem, parsed, downloads) from problem
    except OSError as error:
        raise PresetDownloadFailed(
            f"{parsed} cannot be downloaded to {downloads}: {error.strerror or error}."
        ) from error


def cached_directory(handle: str, cache_dir: Path) -> Path | None:
    """Where the complete files of that handle are, or None. Asks no hub.

    Raises:
        PresetNotFound: The handle is malformed.
    """
    parsed = parse_handle(handle)
    if isinstance(parsed, KaggleHandle) and parsed.version is None:
        folder = cache_dir / "downloads" / parsed.folder
        versions = [path.name for path in _entries(folder) if path.name.isdecimal()]
        revisions = sorted(versions, key=int, reverse=True)
    else:
        revisions = [str(parsed.version if isinstance(parsed, KaggleHandle) else parsed.revision)]
    directories = (_directory(parsed, revision, cache_dir) for revision in revisions)
    return next((path for path in directories if _Marker.read(path) is not None), None)


def is_cached(handle: str, cache_dir: Path) -> bool:
    """Whether the preset of that handle is here, complete. Asks no hub.

    Raises:
        PresetNotFound: The handle is malformed.
    """
    return cached_directory(handle, cache_dir) is not None


def cached_bytes(name_or_handle: str, cache_dir: Path) -> int | None:
    """The bytes on disk of a complete download, or None if there is none. Asks no hub.

    Raises:
        PresetNotFound: Neither the name of a published preset nor a handle.
    """
    preset = BUILTIN_PRESETS.get(name_or_handle)
    directory = cached_directory(preset.handle if preset else name_or_handle, cache_dir)
    marker = directory and _Marker.read(directory)
    return sum(marker.files.values()) if marker else None


@dataclass(frozen=True, slots=True)
class _Marker:
    """What says that a directory is complete: the version or commit, and every file's size."""

    revision: str
    files: dict[str, int]

    @classmethod
    def read(cls, directory: Path) -> "_Marker | None":
        """The marker, if there is one and every file is there with its size."""
        try:
            document = json.loads((directory / _MARKER).read_bytes())
            marker = cls(document["revision"], document["files"])
            sizes = {name: (directory / name).lstat().st_size for name in marker.files}
        # ValueError: a disk may return anything after a power cut.
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return marker if sizes == marker.files else None

    def write(self, directory: Path) -> None:
        temporary = directory / f"{_MARKER}.part"
        temporary.write_text(json.dumps({"revision": self.revision, "files": self.files}))
        synced(temporary)
        temporary.replace(directory / _MARKER)


def _fetch(hub: HubProcess, handle: Handle, cache_dir: Path, progress: Progress) -> Path:
    revision = _revision(hub, handle, cache_dir)
    if isinstance(revision, Path):
        return revision
    directory = _directory(handle, revision, cache_dir)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory, handle):
        marker = _Marker.read(directory)
        if marker is None or marker.revision != revision:
            (directory / _MARKER).unlink(missing_ok=True)
            files = Download(hub, handle, revision, directory, progress).run()
            _Marker(revision, files).write(directory)
    return directory


def _revision(hub: HubProcess, handle: Handle, cache_dir: Path) -> str | Path:
    """The version or commit to have; or, if the hub cannot be asked, the copy that is here."""
    if isinstance(handle, KaggleHandle) and handle.version is not None:
        return str(handle.version)
    try:
        return hub.revision()
    except Problem as problem:
        cached = cached_directory(str(handle), cache_dir)
        if cached is None or problem.kind not in ("unreachable", "offline"):
            raise
        _logger.warning(
            "%s cannot be asked for the newest %s (%s); the complete copy in %s is used",
            *(handle.hub, handle, problem.detail or problem.kind, cached),
        )
        return cached


def _directory(handle: Handle, revision: str, cache_dir: Path) -> Path:
    """Kaggle versions stay side by side; a branch on Hugging Face is one directory that follows."""
    folder = cache_dir / "downloads" / handle.folder
    return folder / (revision if isinstance(handle, KaggleHandle) else handle.revision)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


@contextlib.contextmanager
def _locked(directory: Path, handle: Handle) -> Iterator[None]:
    """Excludes other processes from one directory; the kernel releases it if we die."""
    path = directory.with_name(f".{directory.name}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.info("another process is downloading %s; waiting for it", handle)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _explained(problem: Problem, handle: Handle, downloads: Path) -> PresetError:
    """The error of this package for a problem of the child: what, where, what to do."""
    local = "Or copy a preset directory to this machine and give its path."
    match problem.kind:
        case "refused":
            return PresetDownloadFailed(
                f"{handle.hub} refuses {handle} ({problem.detail}): it is private or does not "
                f"exist, or its terms were not accepted, or there are no credentials. Accept the "
                f"terms at {handle.page}. {handle.credentials}. {local}"
            )
        case "missing":
            return PresetNotFound(
                f"{handle.hub} has no {handle} ({problem.detail}). Look for its name at "
                f"{handle.page}."
            )
        case "unreachable" | "interrupted":
            return PresetDownloadFailed(
                f"{handle} cannot be downloaded: {handle.hub} cannot be reached "
                f"({problem.detail}). Check the network and proxies and try again; what has "
                f"arrived is kept. {local}"
            )
        case "offline":
            return PresetDownloadFailed(
                f"{handle} is not here and HF_HUB_OFFLINE forbids to download it. Unset it. {local}"
            )
        case "disk":
            return PresetDownloadFailed(
                f"{handle} cannot be downloaded: the disk of {downloads} is full, with "
                f"{shutil.disk_usage(downloads).free:,} bytes free. Free some, or choose another "
                "cache directory; what has arrived is kept."
            )
        case "credentials":
            return PresetDownloadFailed(
                f"The credentials of {handle.hub} cannot be read: {problem.detail}. "
                f"{handle.credentials}."
            )
    return PresetDownloadFailed(
        f"{handle} cannot be downloaded from {handle.hub}: {problem.detail}. {local}"
    )
