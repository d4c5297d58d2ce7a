"""keras-hub's part: ``keras_hub_side.py write|read DIRECTORY``; see `exchange`.

Runs in the environment of ``requirements-keras-hub.txt``; imports nothing of this project but
`exchange` beside it. Writes what keras-hub can save a Gemma as, from random models of its own, and
answers what our writers wrote.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import exchange
import keras_hub
import numpy as np
from keras_hub import models

# One for every kind of layer that has nothing to quantise.
warnings.filterwarnings("ignore", message=".*does not have a `quantize` method")

_SHARD_GIGABYTES = 1e-4

_SIZES = {"vocabulary_size": exchange.VOCABULARY_SIZE, "num_query_heads": 4, "head_dim": 16}
_GEMMA1 = {**_SIZES, "num_layers": 2, "num_key_value_heads": 1, "hidden_dim": 40}
_GEMMA2 = {
    **_SIZES,
    "num_layers": 3,
    "num_key_value_heads": 2,
    "hidden_dim": 48,
    "intermediate_dim": 176,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 5,
}
_GEMMA3 = {
    **_SIZES,
    "image_size": None,
    "num_layers": 7,
    "num_key_value_heads": 2,
    "hidden_dim": 40,
    "intermediate_dim": 72,
    "use_query_key_norm": True,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": 4,
    "global_rope_scaling_factor": 8.0,
}


def task(arguments, dtype="float32"):
    """A causal LM with random weights, norms included."""
    is_gemma3 = "image_size" in arguments
    backbone_class = models.Gemma3Backbone if is_gemma3 else models.GemmaBackbone
    backbone = backbone_class(**{"intermediate_dim": 144, **arguments}, dtype=dtype)
    rng = np.random.default_rng(31)
    for variable in backbone.weights:
        scale = 0.3 if len(variable.shape) == 1 else 1.5 / np.sqrt(variable.shape[-2])
        if "embedding" in variable.path:
            scale = 0.7
        variable.assign(rng.normal(scale=scale, size=variable.shape))
    if is_gemma3:
        tokenizer = models.Gemma3Tokenizer(str(exchange.TOKENIZER), has_vision_tokens=False)
        preprocessor = models.Gemma3CausalLMPreprocessor(tokenizer, sequence_length=24)
        return models.Gemma3CausalLM(backbone=backbone, preprocessor=preprocessor)
    tokenizer = models.GemmaTokenizer(str(exchange.TOKENIZER))
    preprocessor = models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=24)
    return models.GemmaCausalLM(backbone=backbone, preprocessor=preprocessor)


def logits_of(model):
    return np.asarray(model(exchange.rows())).astype(np.float32)


def save(case, model, answering=None, **options):
    """Saves ``model``; what answers is the other one if there is one."""
    case.mkdir(parents=True)
    model.save_to_preset(str(case / "model"), **options)
    exchange.write_answer(case, logits_of(answering or model))


def with_lora(model):
    """LoRA as after a training: no zeros anywhere."""
    model.backbone.enable_lora(4)
    rng = np.random.default_rng(32)
    for variable in model.backbone.trainable_variables:
        variable.assign(rng.normal(scale=0.2, size=variable.shape))
    return model


def write_bfloat16(case):
    """A bfloat16 model; it answers as the same numbers do in float32."""
    case.mkdir(parents=True)
    task(_GEMMA2, dtype="bfloat16").save_to_preset(str(case / "model"))
    loaded = models.GemmaCausalLM.from_preset(str(case / "model"), dtype="float32")
    exchange.write_answer(case, logits_of(loaded))


def write_int8(case, arguments):
    """A model quantised to int8.

    Its answer is that of a float32 model with the quantised weights: the int8 model itself rounds
    activations as well, to 8 bits, at every product.
    """
    model = task(arguments)
    # Not the task: keras-hub 0.32 stops at the tokenizer, which cannot be quantised.
    model.backbone.quantize("int8")
    save(case, model, task_of_quantised_weights(arguments))


def task_of_quantised_weights(arguments):
    """Every matrix rounded to multiples of 1 / 127 of the largest number that shares its scale."""
    model = task(arguments)
    summed_axes = {"query": 1, "key": 1, "value": 1, "attention_output": (0, 1)}
    for variable in model.backbone.weights:
        if len(variable.shape) == 1:
            continue
        layer = variable.path.split("/")[-2]
        axes = 1 if layer == "token_embedding" else summed_axes.get(layer, 0)
        array = np.asarray(variable, np.float32)
        scale = 127.0 / (np.abs(array).max(axis=axes, keepdims=True) + 1e-7)
        variable.assign(np.round(array * scale) / scale)
    return model


def write_lora_file(case, arguments):
    """A preset without LoRA and the file beside it."""
    case.mkdir(parents=True)
    model = task(arguments)
    model.save_to_preset(str(case / "model"))
    with_lora(model).backbone.save_lora_weights(str(case / "adapter.lora.h5"))
    exchange.write_answer(case, logits_of(model))


def write_backbone(case):
    case.mkdir(parents=True)
    model = task(_GEMMA1)
    model.backbone.save_to_preset(str(case / "model"))
    exchange.write_answer(case, logits_of(model))


def write_control(case, arguments):
    model = task(arguments)
    kernel = model.backbone.transformer_layers[0].attention.query_dense.kernel
    changed = np.asarray(kernel).copy()
    changed[0, 0, 0] += exchange.CONTROL_CHANGE
    kernel.assign(changed)
    save(case, model, task(arguments))


def write(directory):
    save(directory / "gemma1_float32", task(_GEMMA1))
    save(directory / "gemma2_float32", task(_GEMMA2))
    save(directory / "gemma3_float32", task(_GEMMA3))
    save(directory / "gemma2_shards", task(_GEMMA2), max_shard_size=_SHARD_GIGABYTES)
    save(directory / "gemma3_shards", task(_GEMMA3), max_shard_size=_SHARD_GIGABYTES)
    save(directory / "gemma2_lora_merged", with_lora(task(_GEMMA2)))
    write_bfloat16(directory / "gemma2_bfloat16")
    write_int8(directory / "gemma1_int8", _GEMMA1)
    write_int8(directory / "gemma2_int8", _GEMMA2)
    write_lora_file(directory / "gemma2_lora_file", _GEMMA2)
    write_lora_file(directory / "gemma3_lora_file", _GEMMA3)
    write_backbone(directory / "gemma1_backbone_alone")
    for name, arguments in (("gemma1", _GEMMA1), ("gemma2", _GEMMA2), ("gemma3", _GEMMA3)):
        write_control(directory / f"{exchange.CONTROL}_{name}", arguments)


def answer(case):
    """keras-hub's logits for what was written for it."""
    loaded = models.CausalLM.from_preset(str(case / "model"), dtype="float32")
    adapter = case / "adapter.lora.h5"
    if adapter.exists():
        loaded.backbone.load_lora_weights(str(adapter))
    return logits_of(loaded)


def main(part, directory):
    sys.stdout.write(f"keras-hub {keras_hub.__version__}: {part}\n")
    if part == "write":
        write(directory)
    else:
        exchange.compare(directory, answer)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
