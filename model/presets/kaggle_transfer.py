"""Files of a Kaggle model, through kagglehub: its credentials, its client, its resuming download.

``kagglehub.model_download`` itself is not used. It tells neither the size nor the digest of a
file, makes directories for whatever name it is given, and cannot resume outside its own cache.
"""

import base64
import contextlib
import errno
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import requests
from kagglehub.clients import build_kaggle_client, download_file  # type: ignore[import-untyped]
from kagglehub.exceptions import DataCorruptionError  # type: ignore[import-untyped]
from kagglehub.handle import ModelHandle  # type: ignore[import-untyped]
from kagglehub.integrity import get_md5_checksum_from_response  # type: ignore[import-untyped]
from kagglesdk.models.types.model_api_service import (  # type: ignore[import-untyped]
    ApiDownloadModelInstanceVersionRequest,
    ApiGetModelInstanceRequest,
    ApiListModelInstanceVersionFilesRequest,
)

from model.presets.hub_handles import KaggleHandle
from model.presets.transfer import Description, Problem

_PAGE_FILES = 100
_MAX_PAGES = 50

_Result = TypeVar("_Result")


class KaggleTransfer:
    """A `Transfer` of one model variation."""

    def __init__(self, handle: KaggleHandle) -> None:
        self._handle = ModelHandle(
            handle.owner, handle.model, handle.framework, handle.variation, handle.version
        )
        try:
            self._framework = self._handle.framework_enum()
        except ValueError:
            raise Problem("missing", f"no framework is called {handle.framework}") from None
        try:
            self._models = build_kaggle_client().models.model_api_client
        except ValueError as error:
            # Names the file of credentials, not what is in it.
            raise Problem("credentials", f"{error!s:.300}") from None
        self._files: dict[str, Description] | None = None

    def revision(self) -> str:
        """The number of the newest version."""
        request = ApiGetModelInstanceRequest()
        self._address(request)
        instance = _call(lambda: self._models.get_model_instance(request))
        return str(instance.version_number)

    def describe(self, revision: str, names: list[str]) -> dict[str, Description]:
        """Sizes; Kaggle states digests with the files only."""
        if self._files is None:
            self._files = self._list(revision)
        return {name: self._files[name] for name in names if name in self._files}

    def get(
        self, revision: str, name: str, path: str, num_bytes: int
    ) -> tuple[int | None, str | None]:
        """Appends to ``path`` what is missing there; size and digest as the answer states them."""
        request = ApiDownloadModelInstanceVersionRequest()
        self._address(request)
        request.version_number = int(revision)
        request.path = name
        with _call(lambda: self._models.download_model_instance_version(request)) as response:
            length = response.headers.get("Content-Length")
            digest = get_md5_checksum_from_response(response)
            # It removes a file that is not what it should be; the caller misses it then.
            with contextlib.suppress(DataCorruptionError):
                _call(lambda: download_file(response, path, self._handle), "interrupted")
        stated_bytes = None if length is None else int(length)
        return stated_bytes, digest and f"md5:{base64.b64decode(digest).hex()}"

    def _list(self, revision: str) -> dict[str, Description]:
        request = ApiListModelInstanceVersionFilesRequest()
        self._address(request)
        request.version_number = int(revision)
        request.page_size = _PAGE_FILES
        files: dict[str, Description] = {}
        for _ in range(_MAX_PAGES):
            page = _call(lambda: self._models.list_model_instance_version_files(request))
            files |= {file.name: (file.size, None) for file in page.files}
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        return files

    def _address(
        self,
        request: ApiGetModelInstanceRequest
        | ApiListModelInstanceVersionFilesRequest
        | ApiDownloadModelInstanceVersionRequest,
    ) -> None:
        request.owner_slug = self._handle.owner
        request.model_slug = self._handle.model
        request.framework = self._framework
        request.instance_slug = self._handle.variation


def _call(call: Callable[[], _Result], unreachable: str = "unreachable") -> _Result:
    """The result, or a `Problem`."""
    try:
        return call()
    except requests.HTTPError as error:
        raise _http_problem(error) from None
    except (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
    ) as error:
        address = "" if error.request is None else urlsplit(error.request.url or "").hostname
        raise Problem(unreachable, str(address or "www.kaggle.com")) from None
    except requests.RequestException as error:
        raise Problem("failed", type(error).__name__) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Problem("disk") from None
        raise Problem("failed", error.strerror or type(error).__name__) from None


def _http_problem(error: requests.HTTPError) -> Problem:
    assert error.response is not None, "kagglesdk raises it for an answer"
    status = error.response.status_code
    if status < 400:
        # Kaggle may say in the body what it does not say in the status.
        status = int(error.response.json()["code"])
    if status in (401, 403):
        return Problem("refused", f"HTTP {status}")
    if status == 404:
        return Problem("missing", "HTTP 404")
    return Problem("unreachable" if status >= 500 else "failed", f"HTTP {status}")
