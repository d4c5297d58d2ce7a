"""What names a preset on a hub: ``kaggle://...`` and ``hf://...``, checked before any use.

Each part matches one strict pattern, so none of them leads out of a directory or changes an
address.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from model.errors import PresetNotFound

_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_KAGGLE, _HUGGING_FACE = "kaggle://", "hf://"


@dataclass(frozen=True, slots=True)
class KaggleHandle:
    """``kaggle://owner/model/framework/variation[/version]``.

    Attributes:
        version: None stands for the newest one.
    """

    owner: str
    model: str
    framework: str
    variation: str
    version: int | None = None

    hub = "Kaggle"
    credentials = (
        "Create an API token at https://www.kaggle.com/settings/api and set KAGGLE_API_TOKEN, or "
        "KAGGLE_USERNAME and KAGGLE_KEY, or save it as ~/.kaggle/access_token"
    )

    def __str__(self) -> str:
        version = "" if self.version is None else f"/{self.version}"
        return f"{_KAGGLE}{self.owner}/{self.model}/{self.framework}/{self.variation}{version}"

    @property
    def is_pinned(self) -> bool:
        """Whether it names the same files for ever."""
        return self.version is not None

    @property
    def page(self) -> str:
        """Where a person accepts the terms."""
        return f"https://www.kaggle.com/models/{self.owner}/{self.model}"

    @property
    def folder(self) -> Path:
        """Relative, of the downloads of all versions."""
        return Path("kaggle", self.owner, self.model, self.framework, self.variation)


@dataclass(frozen=True, slots=True)
class HuggingFaceHandle:
    """``hf://owner/name[@revision]``, where a revision is a branch, a tag or a commit."""

    owner: str
    name: str
    revision: str = "main"

    hub = "Hugging Face"
    credentials = "Run: hf auth login, or set HF_TOKEN to a token of that account"

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{_HUGGING_FACE}{self.repository}{revision}"

    @property
    def repository(self) -> str:
        return f"{self.owner}/{self.name}"

    @property
    def is_pinned(self) -> bool:
        """Whether it names the same files for ever."""
        return _COMMIT.fullmatch(self.revision) is not None

    @property
    def page(self) -> str:
        """Where a person accepts the terms."""
        return f"https://huggingface.co/{self.repository}"

    @property
    def folder(self) -> Path:
        """Relative, of the downloads of all revisions."""
        return Path("hf", f"{self.owner}--{self.name}")


Handle = KaggleHandle | HuggingFaceHandle


def parse_handle(text: str) -> Handle:
    """The handle that ``text`` is.

    Raises:
        PresetNotFound: It is none.
    """
    if text.startswith(_KAGGLE):
        return _parse_kaggle(text)
    if text.startswith(_HUGGING_FACE):
        return _parse_hugging_face(text)
    raise PresetNotFound(
        f"{text!r:.200} is not served: presets come from {_KAGGLE}, {_HUGGING_FACE} and local "
        "paths. Download it and give the path of its directory."
    )


def _parse_kaggle(text: str) -> KaggleHandle:
    parts = text.removeprefix(_KAGGLE).split("/")
    names, version = parts[:4], parts[4:]
    if (
        len(names) == 4
        and all(map(_is_part, names))
        and (version == [] or (len(version) == 1 and _VERSION.fullmatch(version[0])))
    ):
        owner, model, framework, variation = names
        number = int(version[0]) if version else None
        return KaggleHandle(owner, model, framework, variation, number)
    raise PresetNotFound(
        f"{text!r:.200} is not a handle such as {_KAGGLE}keras/gemma2/keras/gemma2_2b_en or, with "
        f"a version, {_KAGGLE}keras/gemma2/keras/gemma2_2b_en/3."
    )


def _parse_hugging_face(text: str) -> HuggingFaceHandle:
    repository, has_revision, revision = text.removeprefix(_HUGGING_FACE).partition("@")
    names = repository.split("/")
    if (
        len(names) == 2
        and all(map(_is_part, names))
        # Two of them separate owner and name in the folder; the hub has no such names either.
        and not any("--" in name for name in names)
        and (not has_revision or (_REVISION.fullmatch(revision) and ".." not in revision))
    ):
        owner, name = names
        return HuggingFaceHandle(owner, name, revision if has_revision else "main")
    raise PresetNotFound(
        f"{text!r:.200} is not a handle such as {_HUGGING_FACE}google/gemma-2-2b or, with a "
        f"branch, tag or commit, {_HUGGING_FACE}google/gemma-2-2b@main."
    )


def _is_part(text: str) -> bool:
    return _PART.fullmatch(text) is not None and ".." not in text
