"""Transformers' part: ``transformers_side.py write|read DIRECTORY``; see `exchange`.

Runs in the environment of ``requirements-transformers.txt``; imports nothing of this project but
`exchange` beside it. Writes random Gemma 1, 2 and 3 with ``save_pretrained``, and answers what our
writer wrote. Everything is float32 on the CPU, attention "eager".
"""

import shutil
import sys
from pathlib import Path

import exchange
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
)

transformers.utils.logging.disable_progress_bar()

_SIZES = {
    "vocab_size": exchange.VOCABULARY_SIZE,
    "num_attention_heads": 4,
    "head_dim": 16,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_GEMMA1 = GemmaConfig(
    **_SIZES, num_hidden_layers=2, num_key_value_heads=1, hidden_size=40, intermediate_size=72
)
_GEMMA2 = Gemma2Config(
    **_SIZES,
    num_hidden_layers=3,
    num_key_value_heads=2,
    hidden_size=48,
    intermediate_size=88,
    query_pre_attn_scalar=16,
    sliding_window=5,
)
_GEMMA3 = Gemma3TextConfig(
    **_SIZES,
    num_hidden_layers=7,
    num_key_value_heads=2,
    hidden_size=40,
    intermediate_size=72,
    query_pre_attn_scalar=16,
    sliding_window=4,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    },
)
_MODELS = {
    "gemma1": (GemmaForCausalLM, _GEMMA1),
    "gemma2": (Gemma2ForCausalLM, _GEMMA2),
    "gemma3": (Gemma3ForCausalLM, _GEMMA3),
}


def random_model(name):
    """A model with random weights, norms included."""
    model_class, config = _MODELS[name]
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(41)
    for parameter_name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[1] ** 0.5
        if "embed_tokens" in parameter_name:
            scale = 0.7
        parameter.data.normal_(0.0, scale, generator=generator)
    return model


@torch.inference_mode()
def logits_of(model):
    rows = exchange.rows()
    answer = model(
        input_ids=torch.tensor(rows["token_ids"], dtype=torch.long),
        attention_mask=torch.tensor(rows["padding_mask"], dtype=torch.long),
        # Counted from the left, as in keras-hub.
        position_ids=torch.arange(rows["token_ids"].shape[1])[None].repeat(3, 1),
        use_cache=False,
    )
    return answer.logits.float().numpy()


def save(case, model, **options):
    model.save_pretrained(case / "model", **options)
    # The vocabulary that goes with every checkpoint of Gemma.
    shutil.copy(exchange.TOKENIZER, case / "model" / "tokenizer.model")


def save_adapted(case, name, **options):
    """A model, and beside it an adapter of PEFT without a zero."""
    save(case, random_model(name))
    model = get_peft_model(
        random_model(name), LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    )
    generator = torch.Generator().manual_seed(42)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(case / "adapter")
    exchange.write_answer(case, logits_of(model.eval()))


def write(directory):
    for name in _MODELS:
        for case, options in (("float32", {}), ("shards", {"max_shard_size": "100KB"})):
            model, folder = random_model(name), directory / f"{name}_{case}"
            save(folder, model, **options)
            exchange.write_answer(folder, logits_of(model))

        folder = directory / f"{name}_bfloat16"
        save(folder, random_model(name).to(torch.bfloat16))
        # The same numbers in float32. The model itself has a rounded rotary table, too.
        exchange.write_answer(folder, answer(folder))

        for case, options in (
            ("peft", {"target_modules": ["q_proj", "v_proj"]}),
            ("peft_rslora", {"target_modules": "all-linear", "use_rslora": True}),
        ):
            save_adapted(directory / f"{name}_{case}", name, **options)

        changed, folder = random_model(name), directory / f"{exchange.CONTROL}_{name}"
        changed.model.layers[0].self_attn.q_proj.weight.data[0, 0] += exchange.CONTROL_CHANGE
        save(folder, changed)
        exchange.write_answer(folder, logits_of(random_model(name)))


def answer(case):
    """Logits of a saved model in float32, the same for ours and for transformers' own."""
    model = AutoModelForCausalLM.from_pretrained(
        case / "model", dtype=torch.float32, attn_implementation="eager"
    )
    if (case / "adapter").exists():
        model = PeftModel.from_pretrained(model, case / "adapter")
    return logits_of(model.eval())


def main(part, directory):
    sys.stdout.write(f"transformers {transformers.__version__}: {part}\n")
    if part == "write":
        write(directory)
    else:
        exchange.compare(directory, answer)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
