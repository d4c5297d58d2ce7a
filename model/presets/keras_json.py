"""The JSON files of a Keras preset, as keras-hub 0.32 writes them.

Each object is Keras' serialization of one: module, class name, constructor arguments, registered
name. Gemma 1 and 2 share their classes; Gemma 3 has its own, with vision arguments left empty.
"""

import dataclasses
import importlib.metadata
import time
from dataclasses import dataclass

from model.config import Family, GemmaConfig
from model.gemma.keras_arguments import keras_arguments
from model.weight_names import num_parameters

KerasJson = dict[str, object]

# The version whose files these are; it is not installed here.
_KERAS_HUB_VERSION = "0.32.0"


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What a preset says about packing texts into rows; the defaults are keras-hub's.

    Attributes:
        sequence_length: Tokens of a row.
        add_start_token: Whether training rows begin with ``<bos>``.
        add_end_token: Whether training rows end with ``<eos>``.
    """

    sequence_length: int = 1024
    add_start_token: bool = True
    add_end_token: bool = True


def preset_files(
    config: GemmaConfig, dtype: str, preprocessing: Preprocessing | None
) -> dict[str, KerasJson]:
    """Name and content of every JSON file but the index of the shards.

    Args:
        config: The architecture.
        dtype: Of the weights.
        preprocessing: None for a model without a tokenizer.
    """
    backbone = _backbone(config, dtype)
    files = {"config.json": backbone, "metadata.json": _metadata(config)}
    if preprocessing is None:
        return {**files, "task.json": _task(config, backbone, None)}
    tokenizer = _tokenizer(config)
    preprocessor = _preprocessor(config, tokenizer, preprocessing)
    return {
        **files,
        "task.json": _task(config, backbone, preprocessor),
        "tokenizer.json": tokenizer,
        "preprocessor.json": preprocessor,
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


def _backbone(config: GemmaConfig, dtype: str) -> KerasJson:
    arguments: KerasJson = {
        "name": backbone_name(config),
        "trainable": True,
        "dtype": _dtype_policy(dtype),
        **keras_arguments(config),
    }
    return _serialized(config, "backbone", f"{_class_prefix(config)}Backbone", arguments)


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


def _preprocessor(
    config: GemmaConfig, tokenizer: KerasJson, preprocessing: Preprocessing
) -> KerasJson:
    arguments: KerasJson = {
        "name": f"{_stem(config)}_causal_lm_preprocessor",
        "trainable": True,
        "dtype": _dtype_policy("float32"),
        "tokenizer": tokenizer,
        "config_file": "preprocessor.json",
        **dataclasses.asdict(preprocessing),
    }
    if config.family is Family.GEMMA3:
        arguments |= {"num_vision_tokens_per_image": 256, "max_images_per_prompt": 2}
    class_name = f"{_class_prefix(config)}CausalLMPreprocessor"
    return _serialized(config, "causal_lm_preprocessor", class_name, arguments)


def _task(config: GemmaConfig, backbone: KerasJson, preprocessor: KerasJson | None) -> KerasJson:
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
