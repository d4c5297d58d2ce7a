"""The facts that tell one Gemma from another, and the limits that every config must keep.

A config names an architecture completely: with it and the arrays of `model.gemma.weights` the
forward pass is determined. Readers of preset files produce one; nothing else is read from a file.
"""

import math
from dataclasses import dataclass, fields
from enum import StrEnum

from model.errors import PresetFileInvalid

LOCAL_ROPE_THETA = 10_000.0


class Family(StrEnum):
    """Which generation of the architecture; decides defaults, never the mathematics."""

    GEMMA = "gemma"
    GEMMA2 = "gemma2"
    GEMMA3 = "gemma3"


# Trained context in tokens. Preset files do not state it; the smallest member of each family does.
TRAINED_CONTEXT_TOKENS = {Family.GEMMA: 8_192, Family.GEMMA2: 8_192, Family.GEMMA3: 32_768}

# Closed ranges, checked before anything is allocated. The largest Gemma stays well inside them.
_RANGES: dict[str, tuple[float, float]] = {
    "vocabulary_size": (8, 1_048_576),
    "num_layers": (1, 256),
    "num_query_heads": (1, 256),
    "num_key_value_heads": (1, 256),
    "hidden_dim": (1, 65_536),
    "feed_forward_dim": (1, 524_288),
    "head_dim": (2, 1_024),
    "context_tokens": (1, 1_048_576),
    "sliding_window_tokens": (1, 1_048_576),
    "global_layer_period": (1, 256),
    "attention_soft_cap": (1e-3, 1e6),
    "final_soft_cap": (1e-3, 1e6),
    "global_rope_theta": (1.0, 1e9),
    "global_rope_scale": (1e-3, 1e6),
    "norm_epsilon": (1e-12, 1e-1),
    "final_norm_epsilon": (1e-12, 1e-1),
    "query_pre_attention_scalar": (1e-3, 1e6),
}


@dataclass(frozen=True, slots=True)
class GemmaConfig:
    """One architecture. Every field changes the output of the model (a test tries each).

    Attributes:
        family: Generation, for defaults such as the end-of-turn stop; not used in the forward pass.
        vocabulary_size: V, rows of the embedding table.
        num_layers: Decoder blocks.
        num_query_heads: N.
        num_key_value_heads: K, divides N. Query head n reads key/value head n // (N / K).
        hidden_dim: D.
        feed_forward_dim: F, the width of *each* feed-forward matrix (keras-hub's Gemma 1 and 2
            configs store twice this number).
        head_dim: H, even, independent of D / N.
        use_post_attention_norm: RMSNorm on the attention output before the residual sum.
        use_post_ffw_norm: RMSNorm on the feed-forward output before the residual sum.
        use_query_key_norm: RMSNorm over H on queries and keys before RoPE (Gemma 3).
        attention_soft_cap: cap · tanh(logits / cap) on attention logits, or None.
        final_soft_cap: The same on the output logits, or None.
        sliding_window_tokens: A token of a local layer sees itself and this many − 1 before it;
            None if every layer is global.
        global_layer_period: Layer i is global iff (i + 1) is a multiple of it: 2 in Gemma 2, 6 in
            Gemma 3. Ignored without a sliding window.
        global_rope_theta: Base of the RoPE wavelengths of global layers; local ones use 10,000.
        global_rope_scale: Global inverse frequencies are divided by it.
        norm_epsilon: Of the norms in blocks.
        final_norm_epsilon: Of the norm before the head.
        context_tokens: Longest sequence the model was trained for.
        query_pre_attention_scalar: Queries are scaled by 1 / √ of it; None is H. The 27B models of
            Gemma 2 and 3 were trained with D / N instead, which their Keras presets do not say.

    Raises:
        PresetFileInvalid: A value is out of range, or two values contradict each other.
    """

    family: Family
    vocabulary_size: int
    num_layers: int
    num_query_heads: int
    num_key_value_heads: int
    hidden_dim: int
    feed_forward_dim: int
    head_dim: int
    use_post_attention_norm: bool = False
    use_post_ffw_norm: bool = False
    use_query_key_norm: bool = False
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    sliding_window_tokens: int | None = None
    global_layer_period: int = 1
    global_rope_theta: float = 10_000.0
    global_rope_scale: float = 1.0
    norm_epsilon: float = 1e-6
    final_norm_epsilon: float = 1e-6
    context_tokens: int = 8_192
    query_pre_attention_scalar: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_field(field.name)
        if self.num_query_heads % self.num_key_value_heads:
            raise PresetFileInvalid(
                f"num_query_heads ({self.num_query_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.head_dim % 2:
            raise PresetFileInvalid(
                f"head_dim must be even to pair its two halves, got {self.head_dim}."
            )

    def _check_field(self, name: str) -> None:
        value = getattr(self, name)
        if name not in _RANGES or value is None:
            return
        low, high = _RANGES[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not low <= value <= high:
            raise PresetFileInvalid(f"{name} must be in [{low:g}, {high:g}], got {value!r:.40}.")
        if isinstance(low, int) and not isinstance(value, int):
            raise PresetFileInvalid(f"{name} must be an integer, got {value!r:.40}.")

    def is_local(self, layer: int) -> bool:
        """Whether the block at ``layer`` attends inside the sliding window only."""
        if self.sliding_window_tokens is None:
            return False
        return (layer + 1) % self.global_layer_period != 0

    @property
    def query_scale(self) -> float:
        """Factor on queries before the dot product: 1 / √H unless the config says otherwise.

        keras-hub stores a flag for another rule and ignores it (spec 1.5); so does the reader of
        Keras presets, for the same answers. Hugging Face directories state the number.
        """
        scalar = self.query_pre_attention_scalar
        return 1.0 / math.sqrt(self.head_dim if scalar is None else scalar)
