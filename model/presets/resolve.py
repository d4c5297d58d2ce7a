"""From what a person types to a preset that is ready to load."""

from pathlib import Path

from model.errors import PresetNotFound, UnsupportedPreset
from model.presets.converted import ConvertedPreset, convert
from model.presets.hf_config import is_hugging_face, read_document
from model.presets.hf_directory import HuggingFacePreset
from model.presets.keras_directory import KerasPreset
from model.presets.reader import PresetReader
from model.progress import Progress, no_progress

TINY = "tiny"
DEMO = "gemma3_270m"
PRESET_NAMES = (TINY, DEMO)
# Whether a built-in preset was tuned to follow instructions; no file says so for other ones.
IS_INSTRUCT = {TINY: False, DEMO: False}

_TINY_DIRECTORY = Path(__file__).parent / "tiny"

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


def open_preset(
    name_or_path: str, cache_dir: Path, *, progress: Progress = no_progress
) -> ConvertedPreset:
    """The preset with that name or at that path, converted if it is not yet.

    Args:
        name_or_path: One of `PRESET_NAMES`, which win over a path of the same name; or a Keras
            preset or Hugging Face directory; or a ``.gguf`` file.
        cache_dir: Where converted presets are kept.
        progress: Told about downloading and converting.

    Raises:
        PresetNotFound: Neither a name nor a path that exists.
        UnsupportedPreset: A file of a kind that is not read.
        PresetError: The files cannot be read or converted.
    """
    return convert(_reader(name_or_path, cache_dir, progress), cache_dir, progress=progress)


def _reader(name_or_path: str, cache_dir: Path, progress: Progress) -> PresetReader:
    if name_or_path == TINY:
        return KerasPreset.open(_TINY_DIRECTORY)
    if name_or_path == DEMO:
        return _open_demo(cache_dir, progress)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _open_directory(path)
    reason = _REFUSED_SUFFIXES.get(path.suffix.lower())
    if reason is not None:
        raise UnsupportedPreset(
            f"{name_or_path!r:.200} is not read: {reason}. Use a Keras preset or Hugging Face "
            "directory, or GGUF."
        )
    if not path.exists():
        raise PresetNotFound(
            f"There is no preset {name_or_path!r:.200}. Known names are {', '.join(PRESET_NAMES)}; "
            "a path may be a Keras preset or Hugging Face directory or a .gguf file."
        )
    if path.suffix.lower() != ".gguf":
        raise UnsupportedPreset(
            f"{name_or_path!r:.200} is not read: only Keras preset and Hugging Face directories "
            "and .gguf files are."
        )
    # Here and below, imported late: a Keras preset needs no GGUF packages.
    from model.presets.gguf_file import GgufPreset

    return GgufPreset.open(path)


def _open_directory(path: Path) -> PresetReader:
    if is_hugging_face(read_document(path)):
        return HuggingFacePreset.open(path)
    return KerasPreset.open(path)


def _open_demo(cache_dir: Path, progress: Progress) -> PresetReader:
    from model.presets.demo import assemble
    from model.presets.gguf_file import GgufPreset

    def copied(done: int, total: int) -> None:
        progress("download", float(done), float(total))

    return GgufPreset.open(assemble(cache_dir / "downloads", copied))
