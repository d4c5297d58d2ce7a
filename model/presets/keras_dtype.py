"""The dtype in the config.json of a Keras preset, which tells the layers that are stored in int8.

A model of floats has one float policy; which one does not matter, because every array in the
weights file states its own type. ``quantize("int8")`` leaves a map instead, from the path of a
layer to its policy; a layer that is not in the map has floats.
"""

from collections.abc import Mapping

from model.config import GemmaConfig
from model.errors import PresetFileInvalid, UnsupportedPreset
from model.weight_names import EMBEDDINGS, weight_specs

_FLOAT_POLICIES = {"float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16"}
_REMEDY = "Save the preset with a float dtype such as bfloat16, or quantise it to int8."


def int8_weights(policy: object, config: GemmaConfig) -> frozenset[str]:
    """Names, as in `weight_specs`, of the arrays that ``policy`` stores as integers with scales.

    Args:
        policy: The value of "dtype" in config.json.
        config: Decides which layers there are.

    Raises:
        PresetFileInvalid: It is no policy.
        UnsupportedPreset: Another quantisation, or of a layer that cannot be quantised.
    """
    if not isinstance(policy, dict) or policy.get("class_name") != "DTypePolicyMap":
        if not _is_float(policy):
            raise UnsupportedPreset(
                f"dtype is {_name(policy)!r:.60}: weights that are quantised so are not read. "
                f"{_REMEDY}"
            )
        return frozenset()
    inner = policy.get("config")
    policies = inner.get("policy_map") if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or not isinstance(policies, dict):
        raise PresetFileInvalid("dtype is a DTypePolicyMap without a policy_map.")
    if not _is_float(inner.get("default_policy")):
        raise UnsupportedPreset(
            f"dtype has the default_policy {_name(inner['default_policy'])!r:.60}; only floats can "
            f"be the default. {_REMEDY}"
        )
    return _quantised(policies, config)


def _quantised(policies: Mapping[str, object], config: GemmaConfig) -> frozenset[str]:
    # Matrices only: norms stay floats.
    weight_of_layer = {
        spec.name.rpartition("/")[0]: spec.name
        for spec in weight_specs(config)
        if spec.name == EMBEDDINGS or len(spec.shape) > 1
    }
    names: set[str] = set()
    for layer, policy in policies.items():
        if _is_float(policy):
            continue
        if not _is_int8(policy):
            raise UnsupportedPreset(
                f"dtype has the policy {_name(policy)!r:.60} for the layer {layer!r:.80}: weights "
                f"that are quantised so are not read. {_REMEDY}"
            )
        if layer not in weight_of_layer:
            raise UnsupportedPreset(
                f"dtype quantises {layer!r:.80}, which is no layer of this model that can be."
            )
        names.add(weight_of_layer[layer])
    return frozenset(names)


def _is_float(policy: object) -> bool:
    name = policy
    if isinstance(policy, dict):
        inner = policy.get("config")
        if policy.get("class_name") not in ("DTypePolicy", "FloatDTypePolicy"):
            return False
        if not isinstance(inner, dict):
            return False
        name = inner.get("name")
    # None stands for the policy of the process that loads it.
    return name is None or (isinstance(name, str) and name in _FLOAT_POLICIES)


def _is_int8(policy: object) -> bool:
    if not isinstance(policy, dict) or policy.get("class_name") != "QuantizedDTypePolicy":
        return False
    inner = policy.get("config")
    if not isinstance(inner, dict) or inner.keys() - {"mode", "source_name"}:
        return False
    return inner.get("mode") == "int8" and _is_float(inner.get("source_name"))


def _name(policy: object) -> object:
    """What identifies a policy to a reader of the message."""
    if not isinstance(policy, dict):
        return policy
    inner = policy.get("config")
    shown = (inner.get("mode") or inner.get("name")) if isinstance(inner, dict) else None
    return shown or policy.get("class_name")
