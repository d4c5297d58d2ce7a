"""How Hugging Face names the arrays of `model.weight_names`.

The shapes are ours already: kernels are ``[out, in]`` with heads folded into the rows, norm scales
are the ``s`` of ``1 + s``, and both worlds pair the halves of a head for RoPE.
"""

from collections.abc import Iterable

from model.config import Family, GemmaConfig
from model.weight_names import EMBEDDINGS, FINAL_NORM, block_weight_name, block_weight_shapes

EMBEDDINGS_TENSOR = "embed_tokens.weight"
_FINAL_NORM_TENSOR = "norm.weight"

# What stands before the names of the language model -> the name of a head beside it. The second is
# what a bare backbone is saved with; the others come from models that can have a vision part.
HEAD_BY_PREFIX = {
    "model.": "lm_head.weight",
    "": "lm_head.weight",
    "model.language_model.": "lm_head.weight",
    "language_model.model.": "language_model.lm_head.weight",
}

# Field of BlockWeights -> the part of the tensor name after ``layers.<i>.``.
_BLOCK_TENSORS = {
    "pre_attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "attention_output": "self_attn.o_proj.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
    "pre_ffw_norm": "pre_feedforward_layernorm.weight",
    "ffw_gating": "mlp.gate_proj.weight",
    "ffw_gating_2": "mlp.up_proj.weight",
    "ffw_linear": "mlp.down_proj.weight",
    "post_ffw_norm": "post_feedforward_layernorm.weight",
}


def tensor_names(config: GemmaConfig, prefix: str = "model.") -> dict[str, str]:
    """Name of each array -> name of its tensor, in the order of `weight_specs`."""
    names = {EMBEDDINGS: prefix + EMBEDDINGS_TENSOR}
    for layer in range(config.num_layers):
        for field in block_weight_shapes(config):
            tensor = f"{prefix}layers.{layer}.{_block_tensor(config, field)}"
            names[block_weight_name(layer, field)] = tensor
    names[FINAL_NORM] = prefix + _FINAL_NORM_TENSOR
    return names


def find_prefix(tensors: Iterable[str]) -> str | None:
    """What stands before the names of the language model, or None if it has no embeddings."""
    found = set(tensors)
    return next((p for p in HEAD_BY_PREFIX if p + EMBEDDINGS_TENSOR in found), None)


def _block_tensor(config: GemmaConfig, field: str) -> str:
    # Gemma 1 has no norm after attention, so Llama's name for the norm that follows attention is
    # that of the norm before the feed-forward layer. Gemma 2 took the name literally.
    if config.family is Family.GEMMA and field == "pre_ffw_norm":
        return _BLOCK_TENSORS["post_attention_norm"]
    return _BLOCK_TENSORS[field]
