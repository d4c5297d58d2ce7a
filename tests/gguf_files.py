"""Writes GGUF files by hand: a tiny Gemma 3, and anything that is almost one."""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from model.config import Family, GemmaConfig
from model.errors import PresetFileInvalid, UnsupportedPreset
from model.presets.gguf_file import GgufPreset
from model.presets.gguf_header import TensorType
from model.weight_names import weight_specs

TOKENS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
    *("\n", "  "),
    *(f"<0x{value:02X}>" for value in range(256)),
    *("\u2581", "a", "b", "c", "ab", "abc", "\u2581a"),
]
TOKEN_TYPES = [3] * 7 + [4] * 2 + [6] * 256 + [1] * 7
SCORES = [-1000.0] * 265 + [-float(i) for i in range(7)]

CONFIG = GemmaConfig(
    family=Family.GEMMA3,
    vocabulary_size=len(TOKENS),
    num_layers=2,
    num_query_heads=2,
    num_key_value_heads=1,
    hidden_dim=32,
    feed_forward_dim=64,
    head_dim=32,
    use_post_attention_norm=True,
    use_post_ffw_norm=True,
    use_query_key_norm=True,
    sliding_window_tokens=4,
    global_layer_period=6,
    global_rope_theta=1_000_000.0,
    global_rope_scale=8.0,
    norm_epsilon=1e-5,
    final_norm_epsilon=1e-5,
    context_tokens=128,
)

# Array of the model -> tensor of the file, written out to be a second opinion.
TENSOR_NAMES = {
    "token_embedding/embeddings": "token_embd.weight",
    "final_normalization/scale": "output_norm.weight",
    "pre_attention_norm/scale": "attn_norm.weight",
    "attention/query/kernel": "attn_q.weight",
    "attention/key/kernel": "attn_k.weight",
    "attention/value/kernel": "attn_v.weight",
    "attention/query_norm/scale": "attn_q_norm.weight",
    "attention/key_norm/scale": "attn_k_norm.weight",
    "attention/attention_output/kernel": "attn_output.weight",
    "post_attention_norm/scale": "post_attention_norm.weight",
    "pre_ffw_norm/scale": "ffn_norm.weight",
    "ffw_gating/kernel": "ffn_gate.weight",
    "ffw_gating_2/kernel": "ffn_up.weight",
    "ffw_linear/kernel": "ffn_down.weight",
    "post_ffw_norm/scale": "post_ffw_norm.weight",
}


@dataclass
class Tensor:
    name: str
    shape: tuple[int, ...]
    tensor_type: int
    data: bytes
    offset: int | None = None


@dataclass
class GgufFile:
    """A GGUF file to be written; ``metadata`` values are Python objects or ready bytes."""

    metadata: dict[str, Any]
    tensors: list[Tensor]
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_keys: int | None = None
    duplicate_key: str = ""
    header_bytes: int = field(default=0, init=False)

    def to_bytes(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        keys = [*self.metadata.items()]
        if self.duplicate_key:
            keys.append((self.duplicate_key, self.metadata[self.duplicate_key]))
        num_keys = len(keys) if self.num_keys is None else self.num_keys
        head = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_keys)
        for key, value in keys:
            head += string(key) + encoded(value)
        body = b""
        for tensor in self.tensors:
            offset = len(body) if tensor.offset is None else tensor.offset
            head += string(tensor.name) + struct.pack("<I", len(tensor.shape))
            head += b"".join(struct.pack("<Q", extent) for extent in reversed(tensor.shape))
            head += struct.pack("<IQ", tensor.tensor_type, offset)
            body += tensor.data + bytes(-len(tensor.data) % 32)
        self.header_bytes = len(head)
        return head + bytes(-len(head) % 32) + body

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def encoded(value: Any) -> bytes:
    """Type number and value, in the types that llama.cpp's converter uses."""
    match value:
        case bytes():
            return value
        case bool():
            return struct.pack("<IB", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + string(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
        case [bool(), *_]:
            return struct.pack("<IIQ", 9, 7, len(value)) + bytes(value)
        case [float(), *_]:
            return struct.pack(f"<IIQ{len(value)}f", 9, 6, len(value), *value)
        case _:
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def metadata_of(config: GemmaConfig) -> dict[str, Any]:
    family = config.family
    return {
        "general.architecture": str(family),
        f"{family}.context_length": config.context_tokens,
        f"{family}.embedding_length": config.hidden_dim,
        f"{family}.block_count": config.num_layers,
        f"{family}.feed_forward_length": config.feed_forward_dim,
        f"{family}.attention.head_count": config.num_query_heads,
        f"{family}.attention.head_count_kv": config.num_key_value_heads,
        f"{family}.attention.key_length": config.head_dim,
        f"{family}.attention.value_length": config.head_dim,
        f"{family}.attention.layer_norm_rms_epsilon": config.norm_epsilon,
        f"{family}.attention.sliding_window": config.sliding_window_tokens or 0,
        f"{family}.rope.freq_base": config.global_rope_theta,
        f"{family}.rope.scaling.type": "linear",
        f"{family}.rope.scaling.factor": config.global_rope_scale,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.scores": SCORES,
        "tokenizer.ggml.token_type": TOKEN_TYPES,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }


def random_arrays(config: GemmaConfig) -> dict[str, np.ndarray]:
    """Multiples of 1/1024, so that the 1 of norms can be added and subtracted without rounding."""
    generator = np.random.default_rng(5)
    return {
        spec.name: (generator.integers(-2048, 2048, spec.shape) / 1024).astype(np.float32)
        for spec in weight_specs(config)
    }


def tensors_of(arrays: dict[str, np.ndarray], kernel_type: TensorType) -> list[Tensor]:
    tensors = []
    for name, array in arrays.items():
        block, _, rest = name.partition("/")
        is_block = block.startswith("decoder_block_")
        tensor_name = TENSOR_NAMES[rest if is_block else name]
        if is_block:
            tensor_name = f"blk.{block.removeprefix('decoder_block_')}.{tensor_name}"
        tensor_type = TensorType.F32 if name.endswith("/scale") else kernel_type
        values = array + np.float32(1) if name.endswith("/scale") else array
        data = quantize(values, GGMLQuantizationType(tensor_type)).tobytes()
        tensors.append(Tensor(tensor_name, array.shape, tensor_type, data))
    return tensors


def tiny_file(kernel_type: TensorType = TensorType.F32, config: GemmaConfig = CONFIG) -> GgufFile:
    return GgufFile(metadata_of(config), tensors_of(random_arrays(config), kernel_type))


def refusal_of(path: Path) -> str:
    with pytest.raises((PresetFileInvalid, UnsupportedPreset)) as info:
        GgufPreset.open(path)
    message = str(info.value)
    assert str(path) in message
    assert "\n" not in message
    return message
