"""The JSON files of a Keras preset, as keras-hub 0.32 writes them.

Each object is Keras' serialization of one: module, class name, constructor arguments, registered
name. Gemma 1 and 2 share their classes; Gemma 3 has its own, with vision arguments left empty.
"""

import importlib.metadata
import time

from model.config import Family, GemmaConfig
from model.gemma.weights import num_parameters

KerasJson = dict[str, object]

# The version whose files these are; it is not installed here.
_KERAS_HUB_VERSION = "0.32.0"
# What keras-hub stores where there is no window, and then does not read.
_UNUSED_WINDOW_TOKENS = {Family.GEMMA: 4_096, Family.GEMMA2: 4_096, Family.GEMMA3: 1_024}


def preset_files(config: GemmaConfig, *, sequence_length: int) -> dict[str, KerasJson]:
    """Name and content of every JSON file but the index of the shards.

    Args:
        config: The architecture.
        sequence_length: To which keras-hub's preprocessor pads and truncates by default.
    """
    backbone = _backbone(config)
    tokenizer = _tokenizer(config)
    preprocessor = _preprocessor(config, tokenizer, sequence_length)
    return {
        "config.json": backbone,
        "tokenizer.json": tokenizer,
        "preprocessor.json": preprocessor,
        "task.json": _task(config, backbone, preprocessor),
        "metadata.json": _metadata(config),
    }


def backbone_name(config: GemmaConfig) -> str:
    """How Keras names the model, in config.json and in the weights file."""
    return f"{_stem(config)}_backbone"


def _stem(config: GemmaConfig) -> str:
    return "gemma3" if config.family is Family.GEMMA3 else "gemma"


def _class_prefix(config: GemmaConfig) -> str:
    return "Gemma3" if config.family is Family.GEMMA3 else "Gemma"


def _serialized(config: GemmaConfig, file: str, class_name: str, arguments: KerasJson) -> KerasJson:
    stem = _stem(config)
    return {
        "module": f"keras_hub.src.models.{stem}.{stem}_{file}",
        "class_name": class_name,
        "config": arguments,
        "registered_name": f"keras_hub>{class_name}",
    }


def _dtype_policy(name: str) -> KerasJson:
    return {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": name},
        "registered_name": None,
    }


def _backbone(config: GemmaConfig) -> KerasJson:
    is_gemma3 = config.family is Family.GEMMA3
    arguments = _gemma3_arguments(config) if is_gemma3 else _gemma_arguments(config)
    common: KerasJson = {
        "name": backbone_name(config),
        "trainable": True,
        "dtype": _dtype_policy("float32"),
        "vocabulary_size": config.vocabulary_size,
    }
    return _serialized(
        config, "backbone", f"{_class_prefix(config)}Backbone", {**common, **arguments}
    )


def _gemma_arguments(config: GemmaConfig) -> KerasJson:
    return {
        **_sizes(config),
        # This backbone counts both gating matrices.
        "intermediate_dim": 2 * config.feed_forward_dim,
        "head_dim": config.head_dim,
        "layer_norm_epsilon": config.final_norm_epsilon,
        "dropout": 0,
        "query_head_dim_normalize": True,
        "use_post_ffw_norm": config.use_post_ffw_norm,
        "use_post_attention_norm": config.use_post_attention_norm,
        "final_logit_soft_cap": config.final_soft_cap,
        "attention_logit_soft_cap": config.attention_soft_cap,
        **_window(config),
    }


def _gemma3_arguments(config: GemmaConfig) -> KerasJson:
    return {
        "image_size": None,
        **_sizes(config),
        "intermediate_dim": config.feed_forward_dim,
        "head_dim": config.head_dim,
        "query_head_dim_normalize": True,
        "use_query_key_norm": config.use_query_key_norm,
        "use_post_ffw_norm": config.use_post_ffw_norm,
        "use_post_attention_norm": config.use_post_attention_norm,
        "attention_logit_soft_cap": config.attention_soft_cap,
        "final_logit_soft_cap": config.final_soft_cap,
        **dict(reversed(_window(config).items())),
        "local_rope_scaling_factor": 1.0,
        "global_rope_scaling_factor": config.global_rope_scale,
        "vision_encoder": None,
        "use_bidirectional_attention": False,
        "layer_norm_epsilon": config.final_norm_epsilon,
        "dropout": 0,
        "is_embedding_model": False,
        "pooling_intermediate_dim": None,
        "embedding_dim": None,
    }


def _sizes(config: GemmaConfig) -> KerasJson:
    return {
        "num_layers": config.num_layers,
        "num_query_heads": config.num_query_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_dim": config.hidden_dim,
    }


def _window(config: GemmaConfig) -> KerasJson:
    has_window = config.sliding_window_tokens is not None
    unused = _UNUSED_WINDOW_TOKENS[config.family]
    return {
        "sliding_window_size": config.sliding_window_tokens if has_window else unused,
        "use_sliding_window_attention": has_window,
    }


def _tokenizer(config: GemmaConfig) -> KerasJson:
    arguments: KerasJson = {
        "name": f"{_stem(config)}_tokenizer",
        "trainable": True,
        "dtype": _dtype_policy("int32"),
        "config_file": "tokenizer.json",
        "proto": None,
        "sequence_length": None,
        "add_bos": False,
        "add_eos": False,
    }
    if config.family is Family.GEMMA3:
        arguments["has_vision_tokens"] = False
    return _serialized(config, "tokenizer", f"{_class_prefix(config)}Tokenizer", arguments)


def _preprocessor(config: GemmaConfig, tokenizer: KerasJson, sequence_length: int) -> KerasJson:
    arguments: KerasJson = {
        "name": f"{_stem(config)}_causal_lm_preprocessor",
        "trainable": True,
        "dtype": _dtype_policy("float32"),
        "tokenizer": tokenizer,
        "config_file": "preprocessor.json",
        "sequence_length": sequence_length,
        "add_start_token": True,
        "add_end_token": True,
    }
    if config.family is Family.GEMMA3:
        arguments |= {"num_vision_tokens_per_image": 256, "max_images_per_prompt": 2}
    class_name = f"{_class_prefix(config)}CausalLMPreprocessor"
    return _serialized(config, "causal_lm_preprocessor", class_name, arguments)


def _task(config: GemmaConfig, backbone: KerasJson, preprocessor: KerasJson) -> KerasJson:
    arguments: KerasJson = {
        "backbone": backbone,
        "preprocessor": preprocessor,
        "name": f"{_stem(config)}_causal_lm",
    }
    return _serialized(config, "causal_lm", f"{_class_prefix(config)}CausalLM", arguments)


def _metadata(config: GemmaConfig) -> KerasJson:
    is_gemma3 = config.family is Family.GEMMA3
    return {
        "keras_version": importlib.metadata.version("keras"),
        "keras_hub_version": _KERAS_HUB_VERSION,
        "parameter_count": num_parameters(config),
        "date_saved": time.strftime("%Y-%m-%d@%H:%M:%S"),
        "tasks": ["CausalLM", "TextEmbedder"] if is_gemma3 else ["CausalLM"],
    }
