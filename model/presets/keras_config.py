"""config.json of a Keras preset directory, as a `GemmaConfig`.

Nothing in the file is ever looked up, imported or constructed: ``module`` is ignored,
``registered_name`` picks one of two readings below, and each value is a checked number or flag.
A key that is missing has the default of keras-hub's constructor, because presets of older
versions lack the newer keys.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.config import TRAINED_CONTEXT_TOKENS, Family, GemmaConfig
from model.errors import PresetError, PresetFileInvalid, UnsupportedPreset
from model.presets.keras_dtype import int8_weights
from model.presets.regular_file import read_regular_file
from model.presets.strict_json import parse_object

_MAX_CONFIG_BYTES = 1 << 20

_GEMMA = {"keras_hub>GemmaBackbone", "keras_nlp>GemmaBackbone"}
_GEMMA3 = {"keras_hub>Gemma3Backbone"}

# Constructor arguments that leave the output of a text model alone. Dropout acts in training only;
# query_head_dim_normalize is stored and ignored in keras-hub too; an image size or an embedding
# head matters only together with the flags that are refused below.
_WITHOUT_EFFECT = {
    "name",
    "trainable",
    "dtype",
    "dropout",
    "query_head_dim_normalize",
    "image_size",
    "pooling_intermediate_dim",
    "embedding_dim",
    # Read only where sliding windows are on.
    "sliding_window_size",
}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """What a config.json says.

    Attributes:
        config: The architecture.
        int8_weights: Names of the arrays that the weights file has as integers with scales.
    """

    config: GemmaConfig
    int8_weights: frozenset[str]


def read_config(path: Path) -> GemmaConfig:
    """The architecture that ``path``, the config.json of a Keras preset, describes.

    Raises:
        PresetError: As for `read_stored_model`.
    """
    return read_stored_model(path).config


def read_stored_model(path: Path) -> StoredModel:
    """The architecture that ``path`` describes, and how its weights are stored.

    A key that neither this reader nor keras-hub 0.32 knows is logged and ignored: refusing it
    would lock out every later version of keras-hub for a key that may mean nothing, and keeping
    quiet would hide one that means something.

    Raises:
        PresetFileInvalid: A value is missing, of the wrong kind or out of range.
        UnsupportedPreset: Another architecture, a vision encoder, an embedding model, a dtype
            quantised otherwise than to int8, or the config.json of a Hugging Face directory.
    """
    document = parse_object(
        read_regular_file(path.parent, path.name, _MAX_CONFIG_BYTES), source=str(path)
    )
    registered_name = document.get("registered_name")
    if registered_name is None and "model_type" in document:
        raise UnsupportedPreset(
            f"{path} belongs to a Hugging Face directory (model_type "
            f"{document['model_type']!r:.40}), not to a Keras preset. Open it as such."
        )
    values = document.get("config")
    if not isinstance(values, dict):
        raise PresetFileInvalid(f'{path}: "config" must be an object of constructor arguments.')
    if registered_name not in (*_GEMMA, *_GEMMA3):
        raise UnsupportedPreset(
            f"{path}: registered_name is {registered_name!r:.60}; only "
            f"{', '.join(sorted(_GEMMA | _GEMMA3))} are served. Use a text preset of one of these, "
            "such as gemma3_1b."
        )
    arguments = _Arguments(values)
    try:
        config = _gemma(arguments) if registered_name in _GEMMA else _gemma3(arguments)
        quantised = int8_weights(values.get("dtype"), config)
    except PresetError as error:
        raise type(error)(f"{path}: {error}") from error
    if unknown := arguments.unread_keys():
        _logger.warning("%s: ignored unknown keys %s", path, ", ".join(map(repr, unknown[:8])))
    return StoredModel(config, quantised)


class _Arguments:
    """Constructor arguments by key. Each read checks the kind and marks the key as known."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values
        self._known = set(_WITHOUT_EFFECT)

    def _get(self, key: str, default: object) -> object:
        self._known.add(key)
        return self._values.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise PresetFileInvalid(f"{key} must be an integer, got {value!r:.40}.")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e30:
            raise PresetFileInvalid(f"{key} must be a number, got {value!r:.40}.")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self._get(key, None) is None else self.number(key, 0.0)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise PresetFileInvalid(f"{key} must be true or false, got {value!r:.40}.")
        return value

    def is_set(self, key: str) -> bool:
        return self._get(key, None) is not None

    def unread_keys(self) -> list[str]:
        return sorted(self._values.keys() - self._known)


def _gemma(arguments: _Arguments) -> GemmaConfig:
    has_post_attention_norm = arguments.flag("use_post_attention_norm", False)
    has_post_ffw_norm = arguments.flag("use_post_ffw_norm", False)
    family = Family.GEMMA2 if has_post_attention_norm or has_post_ffw_norm else Family.GEMMA
    has_window = arguments.flag("use_sliding_window_attention", False)
    return GemmaConfig(
        family=family,
        vocabulary_size=arguments.integer("vocabulary_size"),
        num_layers=arguments.integer("num_layers"),
        num_query_heads=arguments.integer("num_query_heads"),
        num_key_value_heads=arguments.integer("num_key_value_heads"),
        hidden_dim=arguments.integer("hidden_dim"),
        # This backbone counts both gating matrices and halves, rounding down.
        feed_forward_dim=arguments.integer("intermediate_dim") // 2,
        head_dim=arguments.integer("head_dim"),
        use_post_attention_norm=has_post_attention_norm,
        use_post_ffw_norm=has_post_ffw_norm,
        attention_soft_cap=arguments.optional_number("attention_logit_soft_cap"),
        final_soft_cap=arguments.optional_number("final_logit_soft_cap"),
        sliding_window_tokens=arguments.integer("sliding_window_size", 4096)
        if has_window
        else None,
        global_layer_period=2 if has_window else 1,
        # Keras-hub passes it to the final norm and forgets it in the blocks.
        final_norm_epsilon=arguments.number("layer_norm_epsilon", 1e-6),
        context_tokens=TRAINED_CONTEXT_TOKENS[family],
    )


def _gemma3(arguments: _Arguments) -> GemmaConfig:
    _check_is_causal_text_model(arguments)
    has_window = arguments.flag("use_sliding_window_attention", False)
    return GemmaConfig(
        family=Family.GEMMA3,
        vocabulary_size=arguments.integer("vocabulary_size"),
        num_layers=arguments.integer("num_layers"),
        num_query_heads=arguments.integer("num_query_heads"),
        num_key_value_heads=arguments.integer("num_key_value_heads"),
        hidden_dim=arguments.integer("hidden_dim"),
        feed_forward_dim=arguments.integer("intermediate_dim"),
        head_dim=arguments.integer("head_dim"),
        use_post_attention_norm=arguments.flag("use_post_attention_norm", False),
        use_post_ffw_norm=arguments.flag("use_post_ffw_norm", False),
        use_query_key_norm=arguments.flag("use_query_key_norm", True),
        attention_soft_cap=arguments.optional_number("attention_logit_soft_cap"),
        final_soft_cap=arguments.optional_number("final_logit_soft_cap"),
        sliding_window_tokens=arguments.integer("sliding_window_size", 1024)
        if has_window
        else None,
        global_layer_period=6 if has_window else 1,
        global_rope_theta=1_000_000.0,
        global_rope_scale=arguments.number("global_rope_scaling_factor", 1.0),
        final_norm_epsilon=arguments.number("layer_norm_epsilon", 1e-6),
        context_tokens=TRAINED_CONTEXT_TOKENS[Family.GEMMA3],
    )


def _check_is_causal_text_model(arguments: _Arguments) -> None:
    if arguments.is_set("vision_encoder"):
        raise UnsupportedPreset(
            "the preset has a vision_encoder and only text models are served. Use its text "
            "variant, such as gemma3_4b_text."
        )
    for key in ("use_bidirectional_attention", "is_embedding_model"):
        if arguments.flag(key, False):
            raise UnsupportedPreset(
                f"{key} is true: an embedding model does not generate text. Use a causal preset."
            )
    if arguments.number("local_rope_scaling_factor", 1.0) != 1.0:
        raise UnsupportedPreset(
            "local_rope_scaling_factor must be 1: no published Gemma 3 scales its local layers."
        )
