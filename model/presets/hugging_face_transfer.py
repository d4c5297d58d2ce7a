"""Files of a Hugging Face repository, through huggingface_hub.

Plain HTTP is used although the hub offers Xet, too: ``hf_hub_download`` of either kind begins
again from nothing after its process died, and ``http_get`` continues a file. So
HF_HUB_DISABLE_XET changes nothing here, and no cache of Xet appears in the home directory.
"""

import errno
import re
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

# What huggingface_hub raises, and depends on.
import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from model.presets.hub_handles import HuggingFaceHandle
from model.presets.transfer import Description, Problem

# What every preset has, whoever wrote it.
_PROBE = "config.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")

_Result = TypeVar("_Result")


class HuggingFaceTransfer:
    """A `Transfer` of one repository."""

    def __init__(self, handle: HuggingFaceHandle) -> None:
        self._handle = handle

    def revision(self) -> str:
        """The commit. Asks for a file, since a gated repository describes itself to anybody."""
        url = hf_hub_url(self._handle.repository, _PROBE, revision=self._handle.revision)
        commit = _call(lambda: get_hf_file_metadata(url)).commit_hash
        if commit is None or not _COMMIT.fullmatch(commit):
            raise Problem("failed", "its answer names no commit; check HF_ENDPOINT and proxies")
        return commit

    def describe(self, revision: str, names: list[str]) -> dict[str, Description]:
        """Sizes and digests."""
        entries = _call(
            lambda: HfApi().get_paths_info(self._handle.repository, names, revision=revision)
        )
        return {
            entry.path: (
                entry.size,
                f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}",
            )
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def get(
        self, revision: str, name: str, path: str, num_bytes: int
    ) -> tuple[int | None, str | None]:
        """Appends to ``path`` what is missing there. `describe` has told size and digest."""
        url = hf_hub_url(self._handle.repository, name, revision=revision)
        # Compressed on the way, a file has no length and cannot be continued.
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        with open(path, "ab") as file:
            _call(
                lambda: http_get(
                    url, file, resume_size=file.tell(), headers=headers, expected_size=num_bytes
                ),
                "interrupted",
            )
        return None, None


def _call(call: Callable[[], _Result], unreachable: str = "unreachable") -> _Result:
    """The result, or a `Problem`."""
    try:
        return call()
    except OfflineModeIsEnabled:
        raise Problem("offline") from None
    except EntryNotFoundError:
        raise Problem("missing", f"it has no {_PROBE}") from None
    except HfHubHTTPError as error:
        raise _http_problem(error.response.status_code) from None
    except FileMetadataError:
        raise Problem("failed", "its answer is not that of a hub; check HF_ENDPOINT") from None
    except httpx2.TransportError:
        host = urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
        raise Problem(unreachable, host) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Problem("disk") from None
        if error.errno is None:
            # The size is not what was described; the caller looks at the file.
            raise Problem("interrupted", "the file has another size") from None
        raise Problem("failed", error.strerror or type(error).__name__) from None


def _http_problem(status: int) -> Problem:
    if status in (401, 403):
        return Problem("refused", f"HTTP {status}")
    if status == 404:
        return Problem("missing", "HTTP 404")
    return Problem("unreachable" if status >= 500 else "failed", f"HTTP {status}")
