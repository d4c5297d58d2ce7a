"""Where the versions of adapters are: in memory or in files, by the digest of their bytes.

All threads of the worker ask it, so that a version can be asked for as soon as it is there: the
reader, whether there is one; the loop and those that prepare and export, for its bytes.

A version that was made or imported here stands in memory until it lies in a file. One that is
forgotten can be asked for no more, and its bytes stay until `drop_forgotten`: who was admitted
before may still need them.
"""

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path

from model.errors import AdapterUnfit, PresetFileMissing
from service.protocol.messages import AdapterSource

# Of a version that was made here, in the folder that is its own.
ADAPTER_FILE = "adapter.safetensors"
# What is said of a version that cannot be read.
ADAPTER_GONE = "The file of this adapter version is gone, or has changed."


def digest_of(content: bytes) -> str:
    """Names a version."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class AdapterStore:
    """The versions of one worker.

    Args:
        sources: Those that were brought: files of any kind, which somebody else keeps.
    """

    def __init__(self, sources: Iterable[AdapterSource] = ()) -> None:
        self._lock = threading.Lock()
        self._paths = {source.digest: Path(source.path) for source in sources}
        self._brought = set(self._paths)
        self._contents: dict[str, bytes] = {}
        self._forgotten: set[str] = set()

    def __contains__(self, digest: object) -> bool:
        """Whether it may be asked for."""
        with self._lock:
            return digest not in self._forgotten and self._holds(digest)

    def add_content(self, content: bytes) -> str:
        """Takes a version in; returns its digest."""
        digest = digest_of(content)
        with self._lock:
            self._forgotten.discard(digest)
            if digest not in self._paths:
                self._contents[digest] = content
        return digest

    def add_source(self, source: AdapterSource) -> None:
        """Takes in where a version lies that was made here; it need not stand in memory then."""
        with self._lock:
            self._forgotten.discard(source.digest)
            self._brought.discard(source.digest)
            self._paths[source.digest] = Path(source.path)
            self._contents.pop(source.digest, None)

    def forget(self, digest: str) -> None:
        """Nobody may ask for it from now on."""
        with self._lock:
            if self._holds(digest):
                self._forgotten.add(digest)

    def drop_forgotten(self, digest: str) -> bool:
        """Lets go of a version if it was forgotten and has not come again since."""
        with self._lock:
            if digest not in self._forgotten:
                return False
            self._forgotten.remove(digest)
            self._contents.pop(digest, None)
            self._paths.pop(digest, None)
            self._brought.discard(digest)
            return True

    @property
    def digests(self) -> tuple[str, ...]:
        """Of all versions that lie in files."""
        with self._lock:
            return tuple(self._paths)

    def brought_path(self, digest: str) -> Path | None:
        """Where a version lies that was brought; `content` may not know what it is."""
        with self._lock:
            return self._paths[digest] if digest in self._brought else None

    def content(self, digest: str) -> bytes:
        """The bytes that it is named for.

        Raises:
            AdapterUnfit: The version is not here, or its file has changed.
            PresetFileMissing: Its file cannot be read.
        """
        with self._lock:
            content, path = self._contents.get(digest), self._paths.get(digest)
        if content is not None:
            return content
        if path is None:
            raise AdapterUnfit("This adapter version is not here.")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise PresetFileMissing(f"{path} cannot be read: {error.strerror}.") from error
        if digest_of(content) != digest:
            raise AdapterUnfit(f"{path} has changed since it was named.")
        return content

    def _holds(self, digest: object) -> bool:
        return digest in self._contents or digest in self._paths
