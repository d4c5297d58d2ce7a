"""Writes the demo model as Hugging Face files: ``python -m tests.gold.export_weights DIRECTORY``.

Runs in the project's environment, from the repository's root. Run-time kernels are ``[out, in]``
and norm scales are the ``s`` of ``1 + s``, as in Hugging Face, so tensors are renamed and no more.
"""

import json
import os
import sys
from pathlib import Path

from safetensors.numpy import save_file

from model import weight_names as weights
from model.config import GemmaConfig
from model.presets.resolve import DEMO, open_preset

_BLOCK_NAMES = {
    "pre_attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "attention_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "ffw_gating": "mlp.gate_proj",
    "ffw_gating_2": "mlp.up_proj",
    "ffw_linear": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def main(directory: Path) -> None:
    cache_dir = Path(os.environ.get("GEMMA_TEST_CACHE_DIR", directory / "cache"))
    preset = open_preset(DEMO, cache_dir)
    directory.mkdir(parents=True, exist_ok=True)
    names = _tensor_names(preset.config)
    tensors = {names[name]: array for name, array in preset.arrays()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(_config(preset.config), indent=2))
    (directory / "tokenizer.model").write_bytes(preset.tokenizer_proto())
    (directory / "source.json").write_text(json.dumps({"preset_digest": preset.preset_digest}))


def _tensor_names(config: GemmaConfig) -> dict[str, str]:
    names = {
        weights.EMBEDDINGS: "model.embed_tokens.weight",
        weights.FINAL_NORM: "model.norm.weight",
    }
    for layer in range(config.num_layers):
        for field in weights.block_weight_shapes(config):
            theirs = f"model.layers.{layer}.{_BLOCK_NAMES[field]}.weight"
            names[weights.block_weight_name(layer, field)] = theirs
    return names


def _config(config: GemmaConfig) -> dict[str, object]:
    """Gemma 3 text, written from its public description, with the sizes of ``config``."""
    layer_types = [
        "full_attention" if layer % 6 == 5 else "sliding_attention"
        for layer in range(config.num_layers)
    ]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "float32",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.feed_forward_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "layer_types": layer_types,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
