"""The parent's side of `hub_transfer`: starts the child, asks it, watches files grow, ends it."""

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from model.presets.hub_handles import Handle
from model.presets.transfer import Description, Problem

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop());"
    "from model.presets.hub_transfer import main; main()"
)
# What a hub states ends in names of files here, so it is checked like everything from elsewhere.
_REVISION = re.compile(r"[0-9a-f]{40}|[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}|md5:[0-9a-f]{32}")
_ANSWER_SECONDS = 60.0
# A transfer may take days, but not that long without a byte.
_STALL_SECONDS = 120.0
_TICK_SECONDS = 0.1


class HubProcess:
    """A child that talks to the hub of one handle, from ``with`` to the end of its block."""

    def __init__(self, handle: Handle, downloads: Path) -> None:
        self._handle = handle
        self._downloads = downloads
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def __enter__(self) -> "HubProcess":
        self._process = subprocess.Popen(
            # The child imports what we import, wherever it was found; nothing from its own folder.
            [sys.executable, "-P", "-c", _CHILD, str(self._handle), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # What the libraries print is for nobody, and may hold a token.
            stderr=subprocess.DEVNULL,
            env=_environment(os.environ, self._downloads),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.kill()
        # Waits for it, too.
        self._process.__exit__(kind, error, traceback)

    def revision(self) -> str:
        """The version or commit that the handle stands for now."""
        answer = self._ask({"do": "revision"}, _until(_ANSWER_SECONDS))
        revision = str(answer["revision"])
        if not _REVISION.fullmatch(revision):
            raise Problem("failed", f"it names {revision!r:.60} as a version")
        return revision

    def describe(self, revision: str, names: list[str]) -> dict[str, Description]:
        """Size, and digest if the hub states one, of those of the files that exist."""
        request = {"do": "describe", "revision": revision, "names": names}
        answer = self._ask(request, _until(_ANSWER_SECONDS))
        files = answer["files"]
        assert isinstance(files, dict)
        return {name: (size, _checked(digest)) for name, (size, digest) in files.items()}

    def get(
        self,
        revision: str,
        name: str,
        path: Path,
        num_bytes: int,
        max_bytes: int,
        grown: Callable[[int], None],
    ) -> tuple[int | None, str | None]:
        """Appends to ``path`` what is missing there.

        Args:
            num_bytes: The size as it was described.
            max_bytes: The transfer is broken off beyond, whatever the hub says.
            grown: Told the bytes at ``path``, whenever there are more.

        Returns:
            The size and the digest, as far as the hub states them with the file.
        """
        watch = _Watch(path, max_bytes, grown)
        request = {
            "do": "get",
            "revision": revision,
            "name": name,
            "path": str(path),
            "num_bytes": num_bytes,
        }
        answer = self._ask(request, watch)
        stated_bytes, digest = answer["num_bytes"], answer["digest"]
        assert stated_bytes is None or isinstance(stated_bytes, int)
        return stated_bytes, _checked(digest)

    def _ask(self, request: Mapping[str, object], tick: Callable[[], None]) -> dict[str, object]:
        """The answer. ``tick`` is called while there is none; it raises to give up."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        while b"\n" not in self._pending:
            tick()
            if select.select([process.stdout], [], [], _TICK_SECONDS)[0]:
                read = os.read(process.stdout.fileno(), 1 << 16)
                if not read:
                    raise self._died()
                self._pending += read
        line, self._pending = self._pending.split(b"\n", 1)
        answer: dict[str, object] = json.loads(line)
        if "problem" in answer:
            raise Problem(str(answer["problem"]), str(answer["detail"]))
        return answer

    def _died(self) -> Problem:
        assert self._process is not None
        status = self._process.wait()
        return Problem("failed", f"the download process ended with status {status}")


class _Watch:
    """Looks how large a file is. kagglehub has no hook for progress, but every file has a size."""

    def __init__(self, path: Path, max_bytes: int, grown: Callable[[int], None]) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._grown = grown
        self._num_bytes = 0
        self._changed_at = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        num_bytes = size_of(self._path)
        if num_bytes > self._max_bytes:
            raise Problem("failed", f"a file is larger than {self._max_bytes:,} bytes")
        if num_bytes != self._num_bytes:
            self._num_bytes = num_bytes
            self._changed_at = now
            self._grown(num_bytes)
        if now - self._changed_at > _STALL_SECONDS:
            raise Problem("unreachable", f"nothing came for {_STALL_SECONDS:.0f} seconds")


def _checked(digest: object) -> str | None:
    if digest is None:
        return None
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise Problem("failed", f"it states {digest!r:.60} as a digest")
    return digest


def size_of(path: Path) -> int:
    """Of the file at ``path``; 0 if there is none."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _until(seconds: float) -> Callable[[], None]:
    deadline = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > deadline:
            raise Problem("unreachable", f"no answer came for {seconds:.0f} seconds")

    return check


def _environment(environment: Mapping[str, str], downloads: Path) -> dict[str, str]:
    """For the child: the user's settings and credentials, but no bars and no files at home."""
    home = environment.get("HF_HOME") or os.path.join(
        environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return {
        **environment,
        **_kaggle_login(),
        # Where `hf auth login` put the token, which is looked for below HF_HOME otherwise.
        "HF_TOKEN_PATH": environment.get("HF_TOKEN_PATH") or os.path.join(home, "token"),
        "HF_HOME": str(downloads / ".huggingface"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "KAGGLEHUB_CACHE": str(downloads / ".kagglehub"),
        "KAGGLEHUB_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }


def _kaggle_login() -> dict[str, str]:
    """Of this process: ``kagglehub.login()`` leaves it in memory only."""
    config = sys.modules.get("kagglehub.config")
    credentials = config and getattr(config, "_kaggle_credentials", None)
    if not credentials:
        return {}
    found = {
        "KAGGLE_API_TOKEN": credentials.api_key,
        "KAGGLE_USERNAME": credentials.username,
        "KAGGLE_KEY": credentials.key,
    }
    return {name: value for name, value in found.items() if value}
