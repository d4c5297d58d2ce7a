"""``adapter_config.json`` of PEFT: what of it says how an adapter answers.

``r``, ``lora_alpha``, ``use_rslora`` and ``target_modules`` are read. Fields that only say how it
was trained or where it came from may hold anything. All others must be off, those included that
nobody knew when this was written: something that is on and not understood is another adapter.
"""

import json
import math
from collections.abc import Mapping, Sequence

from model.adapter_file import MAX_ALPHA
from model.adapter_shapes import MAX_RANK
from model.errors import AdapterUnfit, PresetFileInvalid
from model.gemma.keras_lora import TARGETS
from model.lora_adapter import LoraForm
from model.presets.strict_json import parse_object

# Field of BlockWeights -> the module of transformers.
MODULES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "ffw_gating": "mlp.gate_proj",
    "ffw_gating_2": "mlp.up_proj",
    "ffw_linear": "mlp.down_proj",
}

_READ = ("r", "lora_alpha", "use_rslora", "target_modules", "peft_type", "bias")
_WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "lora_dropout", "megatron_core"),
    *("parent_library", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("task_type",),
)
# Starts that leave the weights of the model as they are; others change them.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_OFF: tuple[object, ...] = (None, False, [], {})


def parse_config(text: bytes, source: str) -> dict[str, object]:
    """The fields of a config file; ``source`` names it in errors.

    Raises:
        PresetFileInvalid: It is no JSON object.
    """
    return parse_object(text, source)


def parse_metadata(metadata: Mapping[str, str], source: str) -> dict[str, object]:
    """The same fields, each as JSON in the metadata of a safetensors file.

    What is no JSON is taken as text.

    Raises:
        PresetFileInvalid: One has a key twice, or a number that is none.
    """
    fields: dict[str, object] = {}
    for name, text in metadata.items():
        if name == "format":
            continue
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            fields[name] = text
        else:
            wrapped = f'{{"value": {text}}}'.encode("utf-8", "surrogatepass")
            fields[name] = parse_object(wrapped, f"{source}: {name!r:.40}")["value"]
    return fields


def form_of(fields: Mapping[str, object], targets: Sequence[str], source: str) -> LoraForm:
    """What an adapter is made of.

    Args:
        fields: Of its config.
        targets: That its tensors have.
        source: Names it in errors.

    Raises:
        PresetFileInvalid: A field is missing, out of range, or says another thing than the tensors.
        AdapterUnfit: Something is on that is not served.
    """
    if fields.get("peft_type", "LORA") != "LORA":
        raise AdapterUnfit(
            f"{source}: peft_type is {fields['peft_type']!r:.40}; only LORA is read."
        )
    for name in sorted(fields.keys() - set(_READ) - set(_WITHOUT_EFFECT)):
        off = _STARTS if name == "init_lora_weights" else _OFF
        if not any(fields[name] == each and type(fields[name]) is type(each) for each in off):
            raise AdapterUnfit(
                f"{source}: {name!r:.40} is {fields[name]!r:.60}, which is not served."
            )
    if fields.get("bias", "none") != "none":
        raise AdapterUnfit(f"{source}: bias is {fields['bias']!r:.40}; only none is served.")
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise PresetFileInvalid(f"{source}: r must be in [1, {MAX_RANK}], it is {rank!r:.40}.")
    is_stabilized = fields.get("use_rslora", False)
    if type(is_stabilized) is not bool:
        raise PresetFileInvalid(f"{source}: use_rslora must be true or false.")
    # alpha / √rank instead of alpha / rank.
    factor = math.sqrt(rank) if is_stabilized else 1.0
    # Compared before it is multiplied: an int may be larger than any float.
    number = alpha if isinstance(alpha, int | float) and not isinstance(alpha, bool) else 0
    if not 0 < number <= MAX_ALPHA or number * factor > MAX_ALPHA:
        raise PresetFileInvalid(
            f"{source}: lora_alpha must be in (0, {MAX_ALPHA / factor:.0f}], it is {alpha!r:.40}."
        )
    _check_targets(fields.get("target_modules"), targets, source)
    return LoraForm("peft", rank, float(number * factor), tuple(sorted(targets)))


def fields_of(form: LoraForm) -> dict[str, object]:
    """The config of an adapter, as PEFT reads it."""
    assert form.layout == "peft", "in another layout"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": form.rank,
        "lora_alpha": int(form.alpha) if form.alpha.is_integer() else form.alpha,
        "target_modules": [
            MODULES[target].split(".")[1] for target in TARGETS if target in form.targets
        ],
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
        "base_model_name_or_path": None,
    }


def _check_targets(named: object, targets: Sequence[str], source: str) -> None:
    """PEFT names modules by their last parts, or whole."""
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise PresetFileInvalid(f"{source}: target_modules must be a list of names.")
    target_of = {module.split(".")[1]: target for target, module in MODULES.items()}
    found = set()
    for module in named:
        last = module.rpartition(".")[2]
        if last not in target_of:
            raise AdapterUnfit(
                f"{source}: target_modules has {module!r:.80}; served are {', '.join(target_of)}."
            )
        found.add(target_of[last])
    if found != set(targets):
        raise PresetFileInvalid(
            f"{source}: target_modules are others than those of the tensors, which are "
            f"{', '.join(sorted(MODULES[target] for target in targets))}."
        )
