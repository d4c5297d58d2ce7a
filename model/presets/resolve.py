"""From what a person types to a preset that is ready to load."""

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from model.errors import PresetError, PresetNotFound, UnsupportedPreset
from model.presets import hubs
from model.presets.converted import ConvertedPreset, convert
from model.presets.hf_config import is_hugging_face, read_document
from model.presets.hf_directory import HuggingFacePreset
from model.presets.keras_directory import KerasPreset
from model.presets.reader import PresetReader
from model.presets.table import BUILTIN_PRESETS
from model.progress import Progress, no_progress

TINY = "tiny"
DEMO = "gemma3_270m"
PRESET_NAMES = (TINY, *BUILTIN_PRESETS)
# Whether a published preset was tuned to follow instructions, by name and by handle; no file says
# so for other ones.
IS_INSTRUCT: Mapping[str, bool] = MappingProxyType(
    {TINY: False}
    | {preset.name: preset.is_instruct for preset in BUILTIN_PRESETS.values()}
    | {preset.handle: preset.is_instruct for preset in BUILTIN_PRESETS.values()}
)

_TINY_DIRECTORY = Path(__file__).parent / "tiny"
_KINDS = (
    "A preset is a name, kaggle://owner/model/framework/variation, hf://owner/name, a Keras preset "
    "or Hugging Face directory, or a .gguf file."
)

# Formats that can run code when they are loaded, and what is most often mistaken for a preset.
_REFUSED_SUFFIXES = {
    ".keras": "a Keras archive can hold code",
    ".bin": "it may be a pickle, which can hold code",
    ".ckpt": "it may be a pickle, which can hold code",
    ".npy": "it may hold a pickle, which can hold code",
    ".npz": "it may hold a pickle, which can hold code",
    ".pickle": "a pickle can hold code",
    ".pkl": "a pickle can hold code",
    ".pt": "a pickle can hold code",
    ".pth": "a pickle can hold code",
    ".h5": "a weights file alone does not say which model it belongs to",
    ".safetensors": "a weights file alone does not say which model it belongs to",
}

_logger = logging.getLogger(__name__)


def open_preset(
    name_or_path: str, cache_dir: Path, *, progress: Progress = no_progress
) -> ConvertedPreset:
    """The preset of that name, handle or path, downloaded and converted if it is not yet.

    Args:
        name_or_path: As for `open_reader`.
        cache_dir: Where downloads and converted presets are kept.
        progress: Told about downloading and converting.

    Raises:
        PresetError: As `open_reader`, or the files cannot be converted.
    """
    reader = open_reader(name_or_path, cache_dir, progress=progress)
    return convert(reader, cache_dir, progress=progress)


def open_reader(
    name_or_path: str,
    cache_dir: Path,
    *,
    progress: Progress = no_progress,
    may_download: bool = True,
) -> PresetReader:
    """The files of the preset of that name, handle or path, downloaded if they are not yet.

    Args:
        name_or_path: One of `PRESET_NAMES`, which win over a path of the same name; or a handle,
            ``kaggle://owner/model/framework/variation[/version]`` or ``hf://owner/name[@revision]``;
            or a Keras preset or Hugging Face directory; or a ``.gguf`` file.
        cache_dir: Where downloads are kept.
        progress: Told about downloading.
        may_download: Whether a hub may be asked for what is not here.

    Raises:
        ValueError: Not a string.
        PresetNotFound: No such name, handle or path; or not here, and it may not be downloaded.
        PresetDownloadFailed: The hub refuses, cannot be reached, or sends something else.
        UnsupportedPreset: Files of a kind that is not read.
        PresetError: The files cannot be read.
    """
    if not isinstance(name_or_path, str):
        raise ValueError(f"A preset must be a string, got {name_or_path!r:.80}.")
    if name_or_path == TINY:
        return KerasPreset.open(_TINY_DIRECTORY)
    if name_or_path == DEMO:
        return _open_demo(cache_dir, progress, may_download)
    if (preset := BUILTIN_PRESETS.get(name_or_path)) is not None:
        return _open_handle(preset.handle, cache_dir, progress, may_download)
    if "://" in name_or_path:
        return _open_handle(name_or_path, cache_dir, progress, may_download)
    return _open_path(name_or_path)


def _open_handle(
    handle: str, cache_dir: Path, progress: Progress, may_download: bool
) -> PresetReader:
    if may_download:
        return _open_directory(hubs.fetch(handle, cache_dir, progress))
    directory = hubs.cached_directory(handle, cache_dir)
    if directory is None:
        raise PresetNotFound(f"{handle} was not downloaded yet, and it may not be now.")
    return _open_directory(directory)


def _open_demo(cache_dir: Path, progress: Progress, may_download: bool) -> PresetReader:
    """Out of the packages of the demo if they are installed, otherwise as any published preset."""
    # Here and below, imported late: a Keras preset needs no GGUF packages.
    from model.presets.demo import assemble
    from model.presets.gguf_file import GgufPreset

    def copied(done: int, total: int) -> None:
        progress("download", float(done), float(total))

    try:
        path = assemble(cache_dir / "downloads", copied)
    except PresetNotFound as not_installed:
        _logger.info("%s The published weights are used instead.", not_installed)
        try:
            return _open_handle(BUILTIN_PRESETS[DEMO].handle, cache_dir, progress, may_download)
        except PresetError as error:
            raise type(error)(f"{error} Or, for the demo model: {not_installed}") from error
    return GgufPreset.open(path)


def _open_path(name_or_path: str) -> PresetReader:
    try:
        path = Path(name_or_path).expanduser()
        is_directory = path.is_dir()
        exists = path.exists()
    # RuntimeError: "~somebody" has no home directory.
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PresetNotFound(f"{name_or_path!r:.200} cannot be looked up: {reason}") from error
    if is_directory:
        return _open_directory(path)
    reason = _REFUSED_SUFFIXES.get(path.suffix.lower())
    if reason is not None:
        raise UnsupportedPreset(
            f"{name_or_path!r:.200} is not read: {reason}. Use a Keras preset or Hugging Face "
            "directory, or GGUF."
        )
    if not exists:
        raise PresetNotFound(
            f"There is no preset {name_or_path!r:.200}. {_similar(name_or_path)}{_KINDS}"
        )
    if path.suffix.lower() != ".gguf":
        raise UnsupportedPreset(
            f"{name_or_path!r:.200} is not read: only Keras preset and Hugging Face directories "
            "and .gguf files are."
        )
    from model.presets.gguf_file import GgufPreset

    return GgufPreset.open(path)


def _open_directory(path: Path) -> PresetReader:
    if is_hugging_face(read_document(path)):
        return HuggingFacePreset.open(path)
    return KerasPreset.open(path)


def _similar(name: str) -> str:
    """What somebody who misspelt a name may have meant, as a sentence; of a path, nothing."""
    if "/" in name or len(name) > 100:
        return ""
    close = difflib.get_close_matches(name.lower(), PRESET_NAMES, n=3)
    if close:
        return f"Did you mean {' or '.join(close)}? "
    return f"Known names are {', '.join(PRESET_NAMES)}. "
