"""What readers of preset directories share: the tokenizer file and the index of the shards."""

import re
from pathlib import Path

import sentencepiece

from model.errors import PresetFileInvalid
from model.presets.regular_file import read_regular_file
from model.presets.strict_json import parse_object

_MAX_TOKENIZER_BYTES = 16 << 20
_MAX_INDEX_BYTES = 4 << 20
_MAX_SHARDS = 1_000


def read_tokenizer(directory: Path, name: str, *, vocabulary_size: int, size_field: str) -> bytes:
    """The SentencePiece model, with as many pieces as the vocabulary has rows.

    Args:
        directory: The preset.
        name: Of the model's file in it.
        vocabulary_size: As config.json has it, under the key ``size_field``.
        size_field: For the message.

    Raises:
        PresetFileMissing: There is no such file.
        PresetFileInvalid: It is no such model, or has another number of pieces.
    """
    path = directory / name
    proto = read_regular_file(directory, name, _MAX_TOKENIZER_BYTES)
    try:
        num_pieces = sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size()
    except (RuntimeError, OSError, ValueError) as error:
        raise PresetFileInvalid(f"{path} is not a SentencePiece model.") from error
    if num_pieces != vocabulary_size:
        raise PresetFileInvalid(
            f"{path} has {num_pieces} pieces but {size_field} in config.json is {vocabulary_size}."
        )
    return proto


def shard_names(
    directory: Path,
    index_name: str,
    *,
    pattern: re.Pattern[str],
    example: str,
    lists_allowed: bool = False,
) -> tuple[str, ...]:
    """The shards that an index names. Which array is in which one, the shards say themselves.

    Args:
        directory: The preset.
        index_name: The JSON file whose ``weight_map`` maps names to shards.
        pattern: What a shard may be called; no name that it matches leaves the directory.
        example: A good name, for the message.
        lists_allowed: Whether a name may be mapped to several shards, as Keras does.

    Raises:
        PresetFileInvalid: The index is malformed, or names something else or too much.
    """
    path = directory / index_name
    index = parse_object(read_regular_file(directory, index_name, _MAX_INDEX_BYTES), str(path))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PresetFileInvalid(f'{path}: "weight_map" must map names to files.')
    names: set[str] = set()
    for value in weight_map.values():
        for name in value if lists_allowed and isinstance(value, list) else [value]:
            if not isinstance(name, str) or not pattern.fullmatch(name):
                raise PresetFileInvalid(
                    f"{path}: {name!r:.80} is not the name of a shard such as {example}."
                )
            names.add(name)
    if not 1 <= len(names) <= _MAX_SHARDS:
        raise PresetFileInvalid(
            f"{path} names {len(names)} shards; at most {_MAX_SHARDS} are read."
        )
    return tuple(sorted(names))
