"""How a Keras preset packs texts: three numbers and flags of its preprocessor.json.

Like config.json it is data only: nothing in it is looked up, imported or constructed.
"""

from pathlib import Path

from model.errors import PresetFileInvalid
from model.presets.keras_json import Preprocessing
from model.presets.regular_file import read_regular_file
from model.presets.strict_json import parse_object

_FILE = "preprocessor.json"
_MAX_BYTES = 1 << 20
_MAX_SEQUENCE_LENGTH = 1 << 20


def read_preprocessing(directory: Path) -> Preprocessing:
    """What preprocessor.json says; older presets have none, and then keras-hub's defaults hold.

    Raises:
        PresetFileInvalid: A value is of the wrong kind or out of range.
    """
    defaults = Preprocessing()
    if not (directory / _FILE).exists():
        return defaults
    path = directory / _FILE
    document = parse_object(read_regular_file(directory, _FILE, _MAX_BYTES), source=str(path))
    values = document.get("config")
    if not isinstance(values, dict):
        raise PresetFileInvalid(f'{path}: "config" must be an object of constructor arguments.')
    length = values.get("sequence_length", defaults.sequence_length)
    if isinstance(length, bool) or not isinstance(length, int):
        raise PresetFileInvalid(f"{path}: sequence_length must be an integer, got {length!r:.40}.")
    if not 1 <= length <= _MAX_SEQUENCE_LENGTH:
        raise PresetFileInvalid(
            f"{path}: sequence_length must be in [1, {_MAX_SEQUENCE_LENGTH}], got {length}."
        )
    flags = {key: values.get(key, True) for key in ("add_start_token", "add_end_token")}
    for key, flag in flags.items():
        if not isinstance(flag, bool):
            raise PresetFileInvalid(f"{path}: {key} must be true or false, got {flag!r:.40}.")
    return Preprocessing(length, **flags)
