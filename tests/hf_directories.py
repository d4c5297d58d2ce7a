"""Hugging Face directories for tests: the golden ones, and Gemma 3 out of the tiny preset."""

import json
import shutil
from pathlib import Path

from safetensors.numpy import save_file

from model.presets.keras_directory import KerasPreset
from tests.goldens import preset_directory

GOLDENS = Path(__file__).parent / "goldens"
GEMMA1 = GOLDENS / "gemma1_tiny" / "hf"
GEMMA2 = GOLDENS / "gemma2_tiny" / "hf"

# Written out by hand, not imported: two independent spellings of one table.
GEMMA3_BLOCK = {
    "pre_attention_norm/scale": "input_layernorm",
    "attention/query/kernel": "self_attn.q_proj",
    "attention/key/kernel": "self_attn.k_proj",
    "attention/value/kernel": "self_attn.v_proj",
    "attention/query_norm/scale": "self_attn.q_norm",
    "attention/key_norm/scale": "self_attn.k_norm",
    "attention/attention_output/kernel": "self_attn.o_proj",
    "post_attention_norm/scale": "post_attention_layernorm",
    "pre_ffw_norm/scale": "pre_feedforward_layernorm",
    "ffw_gating/kernel": "mlp.gate_proj",
    "ffw_gating_2/kernel": "mlp.up_proj",
    "ffw_linear/kernel": "mlp.down_proj",
    "post_ffw_norm/scale": "post_feedforward_layernorm",
}
GEMMA3_CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "max_position_embeddings": 32768,
}


def gemma3_tensors(prefix="model."):
    tensors = {}
    for name, array in KerasPreset.open(preset_directory("gemma3_tiny")).arrays():
        owner, _, rest = name.partition("/")
        if owner.startswith("decoder_block_"):
            layer = owner.removeprefix("decoder_block_")
            tensors[f"{prefix}layers.{layer}.{GEMMA3_BLOCK[rest]}.weight"] = array
        else:
            short = "embed_tokens" if owner == "token_embedding" else "norm"
            tensors[f"{prefix}{short}.weight"] = array
    return tensors


def write_gemma3(directory, tensors=None, **changes):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(GEMMA3_CONFIG | changes))
    save_file(tensors or gemma3_tensors(), directory / "model.safetensors")
    proto = preset_directory("gemma3_tiny") / "assets/tokenizer/vocabulary.spm"
    shutil.copy(proto, directory / "tokenizer.model")
    return directory


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory
