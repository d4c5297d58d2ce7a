"""Writes a model as a Hugging Face directory that transformers loads with equal logits.

config.json has the older spelling of RoPE (rope_theta, rope_local_base_freq, rope_scaling), which
every version of transformers with Gemma 3 understands. Tensors are written one by one, so that no
second copy of the model is ever in memory.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import sentencepiece

from model.config import LOCAL_ROPE_THETA, Family, GemmaConfig
from model.errors import PresetFileInvalid
from model.presets.entry_directory import write_synced
from model.presets.hf_config import CONFIG_NAME, GLOBAL, LOCAL, read_config
from model.presets.hf_directory import SHARD_INDEX, TOKENIZER, WEIGHTS
from model.presets.hf_layout import tensor_names
from model.presets.safetensors_stream import TensorPlan, write_tensors
from model.presets.written_preset import NamedArray, in_order, new_directory, refuse_if_lost
from model.weight_names import weight_specs

MAX_SHARD_BYTES = 5_000_000_000

FloatName = Literal["float32", "bfloat16"]
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_MODEL_TYPE = {
    Family.GEMMA: ("gemma", "GemmaForCausalLM"),
    Family.GEMMA2: ("gemma2", "Gemma2ForCausalLM"),
    Family.GEMMA3: ("gemma3_text", "Gemma3ForCausalLM"),
}
_SPECIAL_PIECES = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}
_TURN_PIECES = ("<start_of_turn>", "<end_of_turn>")


@dataclass(frozen=True, slots=True)
class _Shard:
    """One weights file: its name and the tensors in it, in the order in which they come."""

    file_name: str
    tensors: tuple[TensorPlan, ...]


def write_hugging_face(
    directory: Path,
    config: GemmaConfig,
    arrays: Iterable[NamedArray],
    tokenizer_proto: bytes,
    *,
    dtype: FloatName = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes ``directory``, which must not exist, whole or not at all.

    Args:
        directory: What is made.
        config: The architecture.
        arrays: Name and array of every weight, in the order of `weight_specs`.
        tokenizer_proto: The SentencePiece model.
        dtype: Of the stored tensors.
        max_shard_bytes: Of tensors in one file. A larger model is split and gets an index; a
            larger tensor has a file of its own.

    Raises:
        UnsupportedPreset: The format cannot express the config.
        PresetFileInvalid: The tokenizer lacks a special piece.
        PresetError: The directory exists, or cannot be written.
    """
    shards = _plan(config, dtype, max_shard_bytes)
    special_ids = _special_ids(tokenizer_proto)
    with new_directory(directory) as staging:
        _write_json(staging / CONFIG_NAME, _config_json(config, special_ids, dtype))
        refuse_if_lost(config, read_config(staging / CONFIG_NAME), "The Hugging Face format")
        _write_json(
            staging / "tokenizer_config.json", _tokenizer_config_json(config, tokenizer_proto)
        )
        write_synced(staging / TOKENIZER, tokenizer_proto)
        source = in_order(config, arrays)
        for shard in shards:
            tensors = (next(source)[1] for _ in shard.tensors)
            write_tensors(staging / shard.file_name, shard.tensors, tensors)
        if len(shards) > 1:
            _write_json(staging / SHARD_INDEX, _index_json(shards))
        # Ends the check of the order: there must be no further array.
        assert next(source, None) is None


def _plan(config: GemmaConfig, dtype: str, max_shard_bytes: int) -> list[_Shard]:
    names = tensor_names(config)
    groups: list[list[TensorPlan]] = [[]]
    group_bytes = 0
    for spec in weight_specs(config):
        tensor = TensorPlan(names[spec.name], spec.shape, _DTYPES[dtype])
        if groups[-1] and group_bytes + tensor.num_bytes > max_shard_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(tensor)
        group_bytes += tensor.num_bytes
    if len(groups) == 1:
        return [_Shard(WEIGHTS, tuple(groups[0]))]
    return [
        _Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def _index_json(shards: list[_Shard]) -> dict[str, object]:
    total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    places = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _config_json(config: GemmaConfig, special_ids: dict[str, int], dtype: str) -> dict[str, object]:
    model_type, architecture = _MODEL_TYPE[config.family]
    document: dict[str, object] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.feed_forward_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": config.context_tokens,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.global_rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **{f"{role}_token_id": special_ids[role] for role in ("bos", "eos", "pad")},
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    if config.family is not Family.GEMMA:
        document |= {
            "query_pre_attn_scalar": config.query_pre_attention_scalar or config.head_dim,
            "final_logit_softcapping": config.final_soft_cap,
            "attn_logit_softcapping": config.attention_soft_cap,
            # A window that hides nothing where there is none: older versions want a number.
            "sliding_window": config.sliding_window_tokens or config.context_tokens,
            "layer_types": [
                LOCAL if config.is_local(layer) else GLOBAL for layer in range(config.num_layers)
            ],
        }
    if config.family is Family.GEMMA3:
        scale = config.global_rope_scale
        is_scaled = scale != 1.0
        document |= {
            "rope_local_base_freq": LOCAL_ROPE_THETA,
            "rope_scaling": {"rope_type": "linear", "factor": scale} if is_scaled else None,
        }
        if config.sliding_window_tokens is not None:
            document["sliding_window_pattern"] = config.global_layer_period
    return document


def _special_ids(proto: bytes) -> dict[str, int]:
    """Id of each special piece, found by its name."""
    processor = _processor(proto)
    ids: dict[str, int] = {}
    for role, piece in _SPECIAL_PIECES.items():
        ids[role] = processor.PieceToId(piece)
        if processor.IdToPiece(ids[role]) != piece:
            raise PresetFileInvalid(f"The tokenizer has no piece {piece}, which a Gemma needs.")
    return ids


def _processor(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, OSError, ValueError) as error:
        raise PresetFileInvalid("The tokenizer is not a SentencePiece model.") from error


def _tokenizer_config_json(config: GemmaConfig, proto: bytes) -> dict[str, object]:
    processor = _processor(proto)
    turns = [p for p in _TURN_PIECES if processor.IdToPiece(processor.PieceToId(p)) == p]
    return {
        "tokenizer_class": "GemmaTokenizer",
        **{f"{role}_token": piece for role, piece in _SPECIAL_PIECES.items()},
        "additional_special_tokens": turns,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "model_max_length": config.context_tokens,
    }


def _write_json(path: Path, document: dict[str, object]) -> None:
    write_synced(path, json.dumps(document, indent=2).encode() + b"\n")
