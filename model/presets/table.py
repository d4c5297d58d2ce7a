"""The published presets: where they are, how large, and which architecture they have.

A config here is what the preset's own config.json is expected to say. It serves to plan memory
before anything is downloaded; what is downloaded is read, and believed, anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from model.config import Family, GemmaConfig
from model.errors import PresetNotFound
from model.weight_names import num_parameters

FloatName = Literal["float32", "bfloat16", "float16"]
_ITEM_BYTES: dict[FloatName, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class BuiltinPreset:
    """One published preset.

    Attributes:
        name: As Keras users know it.
        handle: Of Kaggle, with the version.
        num_parameters: As published. The shapes of ``config`` add up to it.
        config: The architecture.
        is_instruct: Tuned to follow instructions in the chat format. ShieldGemma is not: it
            answers Yes or No to a prompt of its own.
    """

    name: str
    handle: str
    num_parameters: int
    config: GemmaConfig
    is_instruct: bool

    @property
    def family(self) -> Family:
        return self.config.family


def builtin(name: str) -> BuiltinPreset:
    """The published preset of that name.

    Raises:
        PresetNotFound: There is none; the message lists similar names.
    """
    preset = BUILTIN_PRESETS.get(name)
    if preset is None:
        family = name.split("_")[0]
        similar = [known for known in BUILTIN_PRESETS if known.startswith(family)]
        raise PresetNotFound(
            f"There is no published preset {name!r:.80}. Known are "
            f"{', '.join(similar or BUILTIN_PRESETS)}."
        )
    return preset


def memory_bytes(config: GemmaConfig, dtype: FloatName) -> int:
    """Bytes of the weights alone. The KV cache and work space come on top."""
    return num_parameters(config) * _ITEM_BYTES[dtype]


def _gemma(
    layers: int,
    heads: tuple[int, int],
    hidden_dim: int,
    feed_forward_dim: int,
    *,
    context_tokens: int = 8_192,
    soft_caps: tuple[float, float] | tuple[None, None] = (None, None),
) -> GemmaConfig:
    return GemmaConfig(
        family=Family.GEMMA,
        vocabulary_size=256_000,
        num_layers=layers,
        num_query_heads=heads[0],
        num_key_value_heads=heads[1],
        hidden_dim=hidden_dim,
        feed_forward_dim=feed_forward_dim,
        head_dim=256,
        attention_soft_cap=soft_caps[0],
        final_soft_cap=soft_caps[1],
        context_tokens=context_tokens,
    )


def _gemma2(
    layers: int,
    heads: tuple[int, int],
    hidden_dim: int,
    feed_forward_dim: int,
    *,
    head_dim: int = 256,
) -> GemmaConfig:
    return GemmaConfig(
        family=Family.GEMMA2,
        vocabulary_size=256_000,
        num_layers=layers,
        num_query_heads=heads[0],
        num_key_value_heads=heads[1],
        hidden_dim=hidden_dim,
        feed_forward_dim=feed_forward_dim,
        head_dim=head_dim,
        use_post_attention_norm=True,
        use_post_ffw_norm=True,
        attention_soft_cap=50.0,
        final_soft_cap=30.0,
        sliding_window_tokens=4_096,
        global_layer_period=2,
        context_tokens=8_192,
    )


def _gemma3(
    layers: int,
    heads: tuple[int, int],
    hidden_dim: int,
    feed_forward_dim: int,
    *,
    is_small: bool = False,
    head_dim: int = 256,
) -> GemmaConfig:
    return GemmaConfig(
        family=Family.GEMMA3,
        vocabulary_size=262_144,
        num_layers=layers,
        num_query_heads=heads[0],
        num_key_value_heads=heads[1],
        hidden_dim=hidden_dim,
        feed_forward_dim=feed_forward_dim,
        head_dim=head_dim,
        use_post_attention_norm=True,
        use_post_ffw_norm=True,
        use_query_key_norm=True,
        sliding_window_tokens=512 if is_small else 1_024,
        global_layer_period=6,
        global_rope_theta=1_000_000.0,
        global_rope_scale=1.0 if is_small else 8.0,
        context_tokens=32_768 if is_small else 131_072,
    )


_2B = _gemma(18, (8, 1), 2_048, 16_384)
_7B = _gemma(28, (16, 16), 3_072, 24_576)
# Its sizes are certain: with two norms in a block they add up to the published count. The soft
# caps are the defaults of transformers and were never compared with the published config.json.
_VAULT_1B = _gemma(26, (4, 4), 1_152, 6_912, context_tokens=1_024, soft_caps=(50.0, 30.0))

_GEMMA2_2B = _gemma2(26, (8, 4), 2_304, 9_216)
_GEMMA2_9B = _gemma2(42, (16, 8), 3_584, 14_336)
# Published descriptions speak of 42 layers; the weights have 46.
_GEMMA2_27B = _gemma2(46, (32, 16), 4_608, 36_864, head_dim=128)

_GEMMA3_270M = _gemma3(18, (4, 1), 640, 2_048, is_small=True)
_GEMMA3_1B = _gemma3(26, (4, 1), 1_152, 6_912, is_small=True)
_GEMMA3_4B = _gemma3(34, (8, 4), 2_560, 10_240)
_GEMMA3_12B = _gemma3(48, (16, 8), 3_840, 15_360)
_GEMMA3_27B = _gemma3(62, (32, 16), 5_376, 21_504, head_dim=128)

# Published numbers of parameters, for each architecture above.
_COUNTED: list[tuple[GemmaConfig, int, tuple[str, ...]]] = [
    (
        _2B,
        2_506_172_416,
        (
            "keras/gemma/keras/gemma_2b_en/3",
            "keras/gemma/keras/gemma_instruct_2b_en/3",
            "keras/gemma/keras/gemma_1.1_instruct_2b_en/4",
            "keras/codegemma/keras/code_gemma_1.1_2b_en/2",
            "keras/codegemma/keras/code_gemma_2b_en/2",
        ),
    ),
    (
        _7B,
        8_537_680_896,
        (
            "keras/gemma/keras/gemma_7b_en/4",
            "keras/gemma/keras/gemma_instruct_7b_en/4",
            "keras/gemma/keras/gemma_1.1_instruct_7b_en/5",
            "keras/codegemma/keras/code_gemma_7b_en/3",
            "keras/codegemma/keras/code_gemma_instruct_7b_en/3",
            "keras/codegemma/keras/code_gemma_1.1_instruct_7b_en/3",
        ),
    ),
    (_VAULT_1B, 1_038_741_120, ("keras/vaultgemma/keras/vault_gemma_1b_en/2",)),
    (
        _GEMMA2_2B,
        2_614_341_888,
        (
            "keras/gemma2/keras/gemma2_2b_en/2",
            "keras/gemma2/keras/gemma2_instruct_2b_en/2",
            "google/shieldgemma/keras/shieldgemma_2b_en/2",
            "keras/cell2sentence/keras/c2s_scale_gemma_2_2b_en/1",
        ),
    ),
    (
        _GEMMA2_9B,
        9_241_705_984,
        (
            "keras/gemma2/keras/gemma2_9b_en/4",
            "keras/gemma2/keras/gemma2_instruct_9b_en/4",
            "google/shieldgemma/keras/shieldgemma_9b_en/2",
        ),
    ),
    (
        _GEMMA2_27B,
        27_227_128_320,
        (
            "keras/gemma2/keras/gemma2_27b_en/3",
            "keras/gemma2/keras/gemma2_instruct_27b_en/3",
            "google/shieldgemma/keras/shieldgemma_27b_en/2",
            "keras/cell2sentence/keras/c2s_scale_gemma_2_27b_en/1",
        ),
    ),
    (
        _GEMMA3_270M,
        268_098_176,
        ("keras/gemma3/keras/gemma3_270m/3", "keras/gemma3/keras/gemma3_instruct_270m/4"),
    ),
    (
        _GEMMA3_1B,
        999_885_952,
        ("keras/gemma3/keras/gemma3_1b/3", "keras/gemma3/keras/gemma3_instruct_1b/3"),
    ),
    (
        _GEMMA3_4B,
        3_880_099_328,
        ("keras/gemma3/keras/gemma3_4b_text/2", "keras/gemma3/keras/gemma3_instruct_4b_text/3"),
    ),
    (
        _GEMMA3_12B,
        11_765_788_416,
        ("keras/gemma3/keras/gemma3_12b_text/3", "keras/gemma3/keras/gemma3_instruct_12b_text/3"),
    ),
    (
        _GEMMA3_27B,
        27_009_002_240,
        ("keras/gemma3/keras/gemma3_27b_text/4", "keras/gemma3/keras/gemma3_instruct_27b_text/3"),
    ),
]


def _entry(config: GemmaConfig, count: int, address: str) -> BuiltinPreset:
    name = address.split("/")[-2]
    return BuiltinPreset(name, f"kaggle://{address}", count, config, "_instruct_" in name)


BUILTIN_PRESETS: Mapping[str, BuiltinPreset] = MappingProxyType(
    {
        preset.name: preset
        for config, count, addresses in _COUNTED
        for preset in (_entry(config, count, address) for address in addresses)
    }
)
