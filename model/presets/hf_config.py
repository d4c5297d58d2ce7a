"""config.json of a Hugging Face directory, as a `GemmaConfig`.

``model_type`` picks the family; nothing else in the file is looked up or imported. A key that is
missing has the default of transformers, because transformers leaves out what equals its default.
A value that this model cannot honour is refused by name, never ignored.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from model.config import LOCAL_ROPE_THETA, Family, GemmaConfig
from model.errors import PresetError, PresetFileInvalid, UnsupportedPreset
from model.presets.regular_file import read_regular_file
from model.presets.strict_json import parse_object

CONFIG_NAME = "config.json"
LOCAL, GLOBAL = "sliding_attention", "full_attention"
# Of the global layers, unless the config says otherwise: five local ones stand between two.
LAYER_PERIOD = {Family.GEMMA: 1, Family.GEMMA2: 2, Family.GEMMA3: 6}

_MAX_CONFIG_BYTES = 1 << 20
_FAMILIES = {
    "gemma": Family.GEMMA,
    "gemma2": Family.GEMMA2,
    "gemma3_text": Family.GEMMA3,
    "gemma3": Family.GEMMA3,
}
_GEMMA3_GLOBAL_THETA = 1_000_000.0
# A config whose text part is nested, as in "gemma3", names what differs from these and no more.
_GEMMA3_DEFAULTS: dict[str, int] = {
    "vocab_size": 262_208,
    "hidden_size": 2_304,
    "intermediate_size": 9_216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_CONTEXT_TOKENS = {Family.GEMMA: 8_192, Family.GEMMA2: 8_192, Family.GEMMA3: 131_072}

# Keys that leave the logits of a text model alone: identity, training, generation, vision ids.
_WITHOUT_EFFECT = {
    *("_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype"),
    *("dtype", "use_cache", "cache_implementation", "attention_dropout", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "_attn_implementation_autoset"),
    *("boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image"),
    *("text_config", "_sliding_window_pattern"),
}

_VISION = (
    "vision_config is set and only text models are served. Use the text variant of the same size "
    "from Kaggle, such as gemma3_4b_text or gemma3_instruct_4b_text."
)

_logger = logging.getLogger(__name__)


def is_hugging_face(document: Mapping[str, object]) -> bool:
    """Whether a config.json is that of a Hugging Face directory and not of a Keras preset."""
    return "model_type" in document and "registered_name" not in document


def read_document(directory: Path) -> dict[str, object]:
    """The config.json of ``directory``, whoever wrote it.

    Raises:
        PresetFileMissing, PresetFileInvalid: It is not there, or not one JSON object.
    """
    raw = read_regular_file(directory, CONFIG_NAME, _MAX_CONFIG_BYTES)
    return parse_object(raw, source=str(directory / CONFIG_NAME))


def read_config(path: Path) -> GemmaConfig:
    """The architecture that ``path``, the config.json of a Hugging Face directory, describes.

    Raises:
        PresetFileInvalid: A value is missing, of the wrong kind or out of range.
        UnsupportedPreset: Another architecture, or a value that this model cannot honour.
    """
    document = read_document(path.parent)
    values = _Values(document)
    try:
        model_type = values.text("model_type")
        if model_type not in _FAMILIES:
            raise UnsupportedPreset(
                f"model_type is {model_type!r:.60}; only {', '.join(_FAMILIES)} are served. Use a "
                "text model of one of these families, such as gemma-3-1b-it."
            )
        if model_type == "gemma3":
            values = _text_values(values, document)
        config = _read(values, _FAMILIES[model_type])
    except PresetError as error:
        raise type(error)(f"{path}: {error}") from error
    if unknown := values.unread_keys():
        _logger.warning("%s: ignored unknown keys %s", path, ", ".join(map(repr, unknown[:8])))
    return config


class _Values:
    """Values by key. Each read checks the kind and marks the key as known."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values
        self._known = set(_WITHOUT_EFFECT)

    def get(self, key: str, default: object = None) -> object:
        self._known.add(key)
        return self._values.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise PresetFileInvalid(f"{key} must be an integer, got {value!r:.40}.")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e30:
            raise PresetFileInvalid(f"{key} must be a number, got {value!r:.40}.")
        return float(value)

    def optional_number(self, key: str, default: float | None) -> float | None:
        value = self.get(key, default)
        return None if value is None else self.number(key, 0.0)

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise PresetFileInvalid(f"{key} must be a text, got {value!r:.40}.")
        return value

    def child(self, key: str) -> "_Values | None":
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise PresetFileInvalid(f"{key} must be an object, got {value!r:.40}.")
        return _Values(value)

    def refuse_unless(self, key: str, *allowed: object) -> None:
        """Refuses a value that is set and is none of ``allowed``, of which the first is meant."""
        value = self.get(key)
        if value is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
        ):
            raise UnsupportedPreset(
                f"{key} is {value!r:.60}; this model computes with {allowed[0]!r} only."
            )

    def unread_keys(self) -> list[str]:
        return sorted(self._values.keys() - self._known)


def _text_values(values: _Values, document: Mapping[str, object]) -> _Values:
    if values.get("vision_config") is not None:
        raise UnsupportedPreset(_VISION)
    _refuse_unservable(values)
    nested = document.get("text_config")
    if not isinstance(nested, dict):
        raise PresetFileInvalid(f"text_config must be an object, got {nested!r:.40}.")
    return _Values({**_GEMMA3_DEFAULTS, **nested})


def _refuse_unservable(values: _Values) -> None:
    if values.get("quantization_config") is not None:
        raise UnsupportedPreset(
            "quantization_config is set: quantised weights are not read from Hugging Face "
            "directories. Use the original weights, or GGUF."
        )
    values.refuse_unless("tie_word_embeddings", True)


def _read(values: _Values, family: Family) -> GemmaConfig:
    _refuse_unservable(values)
    values.refuse_unless("attention_bias", False)
    values.refuse_unless("use_bidirectional_attention", False)
    values.refuse_unless("hidden_activation", "gelu_pytorch_tanh")
    # Early files of Gemma 1 say "gelu" and mean the approximation by tanh; transformers knows.
    values.refuse_unless("hidden_act", "gelu_pytorch_tanh", "gelu")
    if values.get("vision_config") is not None:
        raise UnsupportedPreset(_VISION)
    head_dim = values.integer("head_dim", 256)
    num_layers = values.integer("num_hidden_layers")
    theta, scale = _global_rope(values, family)
    has_windows = _has_windows(values, family, num_layers)
    epsilon = values.number("rms_norm_eps", 1e-6)
    attention_soft_cap, final_soft_cap = _soft_caps(values, family)
    has_post_norms = family is not Family.GEMMA
    return GemmaConfig(
        family=family,
        vocabulary_size=values.integer("vocab_size"),
        num_layers=num_layers,
        num_query_heads=values.integer("num_attention_heads"),
        num_key_value_heads=values.integer("num_key_value_heads"),
        hidden_dim=values.integer("hidden_size"),
        feed_forward_dim=values.integer("intermediate_size"),
        head_dim=head_dim,
        use_post_attention_norm=has_post_norms,
        use_post_ffw_norm=has_post_norms,
        use_query_key_norm=family is Family.GEMMA3,
        attention_soft_cap=attention_soft_cap,
        final_soft_cap=final_soft_cap,
        sliding_window_tokens=values.integer("sliding_window", 4_096) if has_windows else None,
        global_layer_period=_layer_period(values, family) if has_windows else 1,
        global_rope_theta=theta,
        global_rope_scale=scale,
        # Unlike Keras presets, where only the last norm follows the config.
        norm_epsilon=epsilon,
        final_norm_epsilon=epsilon,
        context_tokens=values.integer("max_position_embeddings", _CONTEXT_TOKENS[family]),
        query_pre_attention_scalar=_query_scalar(values, family, head_dim),
    )


def _soft_caps(values: _Values, family: Family) -> tuple[float | None, float | None]:
    """Of the attention logits and of the output logits."""
    if family is Family.GEMMA:
        return None, None
    attention, final = (50.0, 30.0) if family is Family.GEMMA2 else (None, None)
    return (
        values.optional_number("attn_logit_softcapping", attention),
        values.optional_number("final_logit_softcapping", final),
    )


def _query_scalar(values: _Values, family: Family, head_dim: int) -> float | None:
    """What queries are scaled by instead of head_dim, if it is something else."""
    if family is Family.GEMMA:
        return None
    scalar = values.number("query_pre_attn_scalar", 256.0)
    return None if scalar == head_dim else scalar


def _layer_period(values: _Values, family: Family) -> int:
    period = LAYER_PERIOD[family]
    return values.integer("sliding_window_pattern", period) if family is Family.GEMMA3 else period


def _has_windows(values: _Values, family: Family, num_layers: int) -> bool:
    """Whether some layers are local. Refuses any pattern but "every n-th layer is global"."""
    if family is Family.GEMMA:
        return False
    layer_types = values.get("layer_types")
    period = _layer_period(values, family)
    # Checked again with its reason in GemmaConfig; here it only must not divide by zero.
    if period < 1 or not 1 <= num_layers <= 256:
        return True
    pattern = [GLOBAL if (layer + 1) % period == 0 else LOCAL for layer in range(num_layers)]
    is_windowed = values.get("sliding_window", 4_096) is not None
    if layer_types is None:
        return is_windowed
    if layer_types == [GLOBAL] * num_layers:
        return False
    if layer_types != pattern or not is_windowed:
        raise UnsupportedPreset(
            f"layer_types is {layer_types!r:.120} with sliding_window "
            f"{values.get('sliding_window')!r:.20}; only models whose every layer is global, or "
            f"every layer but each {period}th local, are served."
        )
    return True


def _global_rope(values: _Values, family: Family) -> tuple[float, float]:
    """Theta and scale of the global layers."""
    if family is Family.GEMMA3:
        return _gemma3_global_rope(values)
    values.refuse_unless("rope_theta", LOCAL_ROPE_THETA)
    for key in ("rope_scaling", "rope_parameters"):
        if (rope := values.child(key)) is not None:
            _check_plain_rope(rope, key)
    return LOCAL_ROPE_THETA, 1.0


def _gemma3_global_rope(values: _Values) -> tuple[float, float]:
    theta = values.number("rope_theta", _GEMMA3_GLOBAL_THETA)
    values.refuse_unless("rope_local_base_freq", LOCAL_ROPE_THETA)
    scale = _rope_scale(values.child("rope_scaling"), "rope_scaling")
    if (parameters := values.child("rope_parameters")) is not None:
        if (local := parameters.child(LOCAL)) is not None:
            _check_plain_rope(local, f"rope_parameters.{LOCAL}")
        if (global_ := parameters.child(GLOBAL)) is not None:
            theta = global_.number("rope_theta", theta)
            # The older key wins in transformers, too.
            if values.get("rope_scaling") is None:
                scale = _rope_scale(global_, f"rope_parameters.{GLOBAL}")
        _refuse_unread(parameters, "rope_parameters")
    return theta, scale


def _rope_scale(rope: _Values | None, name: str) -> float:
    if rope is None:
        return 1.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.get("type")
    rope.get("rope_theta")
    if kind not in ("default", "linear"):
        raise UnsupportedPreset(f"{name}.rope_type is {kind!r:.40}; only linear scaling is served.")
    factor = rope.number("factor", 1.0)
    _refuse_unread(rope, name)
    return factor if kind == "linear" else 1.0


def _check_plain_rope(rope: _Values, name: str) -> None:
    theta = rope.number("rope_theta", LOCAL_ROPE_THETA)
    if theta != LOCAL_ROPE_THETA:
        raise UnsupportedPreset(
            f"{name}.rope_theta is {theta:g}; this model computes with {LOCAL_ROPE_THETA:g} only."
        )
    scale = _rope_scale(rope, name)
    if scale != 1.0:
        raise UnsupportedPreset(f"{name}.factor is {scale:g}; only global layers can be scaled.")


def _refuse_unread(values: _Values, name: str) -> None:
    if unread := values.unread_keys():
        raise UnsupportedPreset(f"{name}.{unread[0]:.40} is not served.")
