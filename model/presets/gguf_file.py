"""A preset in one GGUF file, as llama.cpp's converter writes the Gemmas.

open: header, config, tensor names and shapes. arrays: one tensor at a time, block by block.
What this world does differently from ours: names, quantised values, and norms stored as 1 + s.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from model.config import LOCAL_ROPE_THETA, Family, GemmaConfig
from model.errors import PresetFileInvalid, UnsupportedPreset
from model.presets.gguf_header import GgufHeader, GgufTensor, open_gguf, read_header
from model.presets.gguf_tokenizer import sentencepiece_proto
from model.weight_names import EMBEDDINGS, FINAL_NORM, block_weight_name, weight_specs

# Bytes of the file decoded at once; the decoder needs some ten times as much meanwhile.
_CHUNK_BYTES = 4 << 20

_EMBEDDINGS_TENSOR = "token_embd.weight"
_FINAL_NORM_TENSOR = "output_norm.weight"
# Field of BlockWeights -> the part of the tensor name after ``blk.<i>.``.
_BLOCK_TENSORS = {
    "pre_attention_norm": "attn_norm.weight",
    "query": "attn_q.weight",
    "key": "attn_k.weight",
    "value": "attn_v.weight",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "attention_output": "attn_output.weight",
    "post_attention_norm": "post_attention_norm.weight",
    "pre_ffw_norm": "ffn_norm.weight",
    "ffw_gating": "ffn_gate.weight",
    "ffw_gating_2": "ffn_up.weight",
    "ffw_linear": "ffn_down.weight",
    "post_ffw_norm": "post_ffw_norm.weight",
}


@dataclass(frozen=True, slots=True)
class GgufPreset:
    """A `PresetReader` whose source is one GGUF file.

    Attributes:
        header: What the file says; its tensors are exactly those of ``config``, shapes included.
        tensor_of: Name of each array of the model -> the tensor it is read from.
    """

    config: GemmaConfig
    header: GgufHeader = field(repr=False)
    tensor_of: dict[str, GgufTensor] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> "GgufPreset":
        """The preset at ``path``. Reads the header only.

        Raises:
            PresetFileMissing: There is no such file.
            PresetFileInvalid: The file is malformed, or its tensors do not fit its metadata.
            UnsupportedPreset: Not a Gemma, or a variant that the config cannot express.
        """
        header = read_header(path)
        config = read_config(header)
        return cls(config, header, _tensors_by_array(header, config))

    @property
    def source_files(self) -> tuple[Path, ...]:
        return (self.header.path,)

    def tokenizer_proto(self) -> bytes:
        return sentencepiece_proto(self.header)

    def arrays(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Name and float32 array of every weight, in the order of `weight_specs`.

        Raises:
            PresetFileInvalid: The file shrank since `open`, or a weight is not a finite number.
        """
        with open_gguf(self.header.path) as file:
            for name, tensor in self.tensor_of.items():
                array = _read_tensor(file, tensor, self.header.path)
                if name.endswith("/scale"):
                    array -= np.float32(1.0)
                yield name, array


def read_config(header: GgufHeader) -> GemmaConfig:
    """The architecture that the metadata describes.

    Absent keys have the defaults of llama.cpp, which older files rely on. The vocabulary size is
    the number of rows of the embedding table.

    Raises:
        PresetFileInvalid: A key is missing, of the wrong kind or out of range.
        UnsupportedPreset: Another architecture, or one part of several.
    """
    keys = _Keys(header)
    family = keys.family()
    embeddings = header.tensors.get(_EMBEDDINGS_TENSOR)
    if embeddings is None:
        raise PresetFileInvalid(
            f"{header.path}: tensor '{_EMBEDDINGS_TENSOR}' is missing. Convert the model again."
        )
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, tuple) and len(tokens) != embeddings.shape[0]:
        raise PresetFileInvalid(
            f"{header.path}: there are {len(tokens)} tokens but tensor '{_EMBEDDINGS_TENSOR}' has "
            f"{embeddings.shape[0]} rows. Convert the model again."
        )
    num_query_heads = keys.integer("attention.head_count")
    epsilon = keys.real("attention.layer_norm_rms_epsilon", 1e-6)
    common: dict[str, Any] = {
        "family": family,
        "vocabulary_size": embeddings.shape[0],
        "num_layers": keys.integer("block_count"),
        "num_query_heads": num_query_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_query_heads),
        "hidden_dim": keys.integer("embedding_length"),
        "feed_forward_dim": keys.integer("feed_forward_length"),
        "head_dim": keys.integer("attention.key_length"),
        "norm_epsilon": epsilon,
        "final_norm_epsilon": epsilon,
        "context_tokens": keys.integer("context_length"),
    }
    try:
        config = GemmaConfig(**common, **_family_values(family, keys))
    except PresetFileInvalid as error:
        raise PresetFileInvalid(f"{header.path}: {error}") from error
    keys.refuse_unless("attention.value_length", config.head_dim)
    keys.refuse_unless("rope.dimension_count", config.head_dim)
    keys.refuse_unless("rope.freq_base_swa", LOCAL_ROPE_THETA)
    keys.refuse_other_pattern(config)
    return config


def _family_values(family: Family, keys: "_Keys") -> dict[str, Any]:
    rope = {
        "global_rope_theta": keys.real(
            "rope.freq_base", 1_000_000.0 if family is Family.GEMMA3 else LOCAL_ROPE_THETA
        ),
        "global_rope_scale": keys.rope_scale(),
    }
    if family is Family.GEMMA:
        return rope
    post_norms = {"use_post_attention_norm": True, "use_post_ffw_norm": True}
    if family is Family.GEMMA2:
        # Its local layers would follow the same base and scale, which the config cannot say.
        keys.refuse_unless("rope.freq_base", LOCAL_ROPE_THETA)
        keys.refuse_unless("rope.scaling.factor", 1.0)
        return post_norms | {
            "attention_soft_cap": keys.real("attn_logit_softcapping", 50.0),
            "final_soft_cap": keys.real("final_logit_softcapping", 30.0),
            "sliding_window_tokens": keys.integer("attention.sliding_window", 4_096),
            "global_layer_period": 2,
        }
    gemma3_values = {
        "use_query_key_norm": True,
        "attention_soft_cap": keys.real("attn_logit_softcapping", 0.0) or None,
        "final_soft_cap": keys.real("final_logit_softcapping", 0.0) or None,
        "sliding_window_tokens": keys.integer("attention.sliding_window"),
        "global_layer_period": 6,
    }
    return rope | post_norms | gemma3_values


class _Keys:
    """The metadata below ``<architecture>.``, by type."""

    def __init__(self, header: GgufHeader) -> None:
        self.path = header.path
        self.metadata = header.metadata
        self.architecture = self.text("general.architecture", "")

    def family(self) -> Family:
        if self.integer("split.count", 1) > 1:
            raise UnsupportedPreset(
                f"{self.path} is one of several parts. Merge them with llama-gguf-split."
            )
        if self.architecture not in list(Family):
            raise UnsupportedPreset(
                f"{self.path} holds the architecture {self.architecture!r:.80}; only "
                f"{', '.join(Family)} are served."
            )
        return Family(self.architecture)

    def text(self, name: str, default: str) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong_kind(name, "a string", value)
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong_kind(name, "an integer", value)
        return value

    def real(self, name: str, default: int | float) -> float:
        """As the shortest decimal that rounds to it in float32: 1e-06, not 9.999999974752427e-07.

        So the config equals the one that other formats give for the same model.
        """
        value = self._value(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._wrong_kind(name, "a number", value)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite: out of range
            return float(str(np.float32(value)))

    def rope_scale(self) -> float:
        kind = self.text("rope.scaling.type", "linear")
        if kind == "none":
            return 1.0
        if kind != "linear":
            raise UnsupportedPreset(
                f"{self.path}: key '{self._key('rope.scaling.type')}' is {kind!r:.80}; only 'none' "
                "and 'linear' are served."
            )
        return self.real("rope.scaling.factor", 1.0)

    def refuse_unless(self, name: str, expected: int | float) -> None:
        """A key that need not be there, but if it is there must say this."""
        value = self.real(name, expected)
        if value != expected:
            raise UnsupportedPreset(
                f"{self.path}: key '{self._key(name)}' is {value:g}; only {expected:g} is served "
                "for this model."
            )

    def refuse_other_pattern(self, config: GemmaConfig) -> None:
        """Newer files state which layers are local: by the period, or one flag a layer."""
        name = "attention.sliding_window_pattern"
        flags = self._value(name, config.global_layer_period)
        if not isinstance(flags, np.ndarray):
            self.refuse_unless(name, config.global_layer_period)
        elif flags.tolist() != [config.is_local(layer) for layer in range(config.num_layers)]:
            raise UnsupportedPreset(
                f"{self.path}: key '{self._key(name)}' has other local layers than every "
                f"{self.architecture} has."
            )

    def _key(self, name: str) -> str:
        is_common = name.startswith(("general.", "split."))
        return name if is_common else f"{self.architecture}.{name}"

    def _value(self, name: str, default: object) -> object:
        value = self.metadata.get(self._key(name), default)
        if value is None:
            raise PresetFileInvalid(
                f"{self.path}: key '{self._key(name)}' is missing. Convert the model again."
            )
        return value

    def _wrong_kind(self, name: str, expected: str, value: object) -> PresetFileInvalid:
        return PresetFileInvalid(
            f"{self.path}: key '{self._key(name)}' must be {expected}, not "
            f"{type(value).__name__}. Convert the model again."
        )


def _tensor_names(config: GemmaConfig) -> dict[str, str]:
    """Name of every possible array of the model -> name of its tensor."""
    names = {EMBEDDINGS: _EMBEDDINGS_TENSOR, FINAL_NORM: _FINAL_NORM_TENSOR}
    for layer in range(config.num_layers):
        for block_field, suffix in _BLOCK_TENSORS.items():
            names[block_weight_name(layer, block_field)] = f"blk.{layer}.{suffix}"
    return names


def _tensors_by_array(header: GgufHeader, config: GemmaConfig) -> dict[str, GgufTensor]:
    """The tensor of every array, in the order of `weight_specs`, and no tensor besides."""
    names = _tensor_names(config)
    result: dict[str, GgufTensor] = {}
    for spec in weight_specs(config):
        tensor = header.tensors.get(names[spec.name])
        if tensor is None:
            raise PresetFileInvalid(
                f"{header.path}: tensor '{names[spec.name]}' is missing. Convert the model again."
            )
        if tensor.shape != spec.shape:
            raise PresetFileInvalid(
                f"{header.path}: tensor '{tensor.name}' has shape {list(tensor.shape)} but the "
                f"metadata implies {list(spec.shape)}. Convert the model again."
            )
        result[spec.name] = tensor
    _refuse_others(header, {tensor.name for tensor in result.values()})
    return result


def _refuse_others(header: GgufHeader, known: set[str]) -> None:
    """Refuses what the forward pass would leave out.

    ``rope_freqs`` too: it divides the RoPE frequencies one by one. llama.cpp's Gemmas have no
    such tensor, and serving a model that was trained with one without it would be silently wrong.
    """
    others = [name for name in header.tensors if name not in known]
    if not others:
        return
    name = others[0]
    if name == "output.weight":
        raise UnsupportedPreset(
            f"{header.path}: tensor 'output.weight' is a head of its own; a Gemma's head is its "
            "embedding table. Convert the model with tied embeddings."
        )
    if "rope_freqs" in name or "rope_factors" in name:
        raise UnsupportedPreset(
            f"{header.path}: tensor {name!r:.80} changes single RoPE frequencies, which no Gemma "
            "does. Convert the model without it."
        )
    raise PresetFileInvalid(
        f"{header.path}: tensor {name!r:.80} is not part of the model that the metadata describes "
        f"({len(others)} such tensors). Convert the model again."
    )


def _read_tensor(file: BufferedReader, tensor: GgufTensor, path: Path) -> NDArray[np.float32]:
    """The values of one tensor.

    Read and not memory mapped: a file that is cut short under a map kills the process (SIGBUS).
    """
    num_rows = math.prod(tensor.shape[:-1])
    row_bytes = tensor.size_bytes // num_rows
    rows_at_once = max(1, min(num_rows, _CHUNK_BYTES // row_bytes))
    values = np.empty((num_rows, tensor.shape[-1]), np.float32)
    encoded = np.empty((rows_at_once, row_bytes), np.uint8)
    file.seek(tensor.offset_bytes)
    for start in range(0, num_rows, rows_at_once):
        chunk = encoded[: num_rows - start]
        if file.readinto(chunk.data) != chunk.nbytes:
            raise PresetFileInvalid(
                f"{path}: the file became shorter while tensor '{tensor.name}' was read. "
                "Replace presets by renaming, not in place."
            )
        # Hostile scales overflow; the check below speaks for them.
        with np.errstate(all="ignore"):
            decoded = dequantize(chunk, GGMLQuantizationType(tensor.tensor_type))
        if not np.isfinite(decoded).all():
            raise PresetFileInvalid(
                f"{path}: tensor '{tensor.name}' holds values that are not finite numbers. "
                "The file is damaged; download it again."
            )
        values[start : start + len(chunk)] = decoded
    return values.reshape(tensor.shape)
