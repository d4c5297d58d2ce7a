"""A `GemmaConfig` as the arguments of keras-hub's backbones, and back.

Gemma 1 and 2 share one list of arguments, Gemma 3 has another. `model.presets.keras_config` reads
the same names from files, where nothing can be believed; here they come from a program.
"""

from typing import Any

from model.config import TRAINED_CONTEXT_TOKENS, Family, GemmaConfig

# What keras-hub stores where there is no window, and then does not read.
_UNUSED_WINDOW_TOKENS = {Family.GEMMA: 4_096, Family.GEMMA2: 4_096, Family.GEMMA3: 1_024}


def keras_arguments(config: GemmaConfig) -> dict[str, Any]:
    """The constructor's arguments in keras-hub's order, without name, trainable and dtype.

    A query scale of its own, which only Hugging Face directories state, is one more that keras-hub
    does not have.
    """
    is_gemma3 = config.family is Family.GEMMA3
    own = _gemma3_arguments(config) if is_gemma3 else _gemma_arguments(config)
    arguments = {"vocabulary_size": config.vocabulary_size, **own}
    if config.query_pre_attention_scalar is not None:
        arguments["query_pre_attention_scalar"] = config.query_pre_attention_scalar
    return arguments


def _gemma_arguments(config: GemmaConfig) -> dict[str, Any]:
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


def _gemma3_arguments(config: GemmaConfig) -> dict[str, Any]:
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


def _sizes(config: GemmaConfig) -> dict[str, Any]:
    return {
        "num_layers": config.num_layers,
        "num_query_heads": config.num_query_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_dim": config.hidden_dim,
    }


def _window(config: GemmaConfig) -> dict[str, Any]:
    has_window = config.sliding_window_tokens is not None
    unused = _UNUSED_WINDOW_TOKENS[config.family]
    return {
        "sliding_window_size": config.sliding_window_tokens if has_window else unused,
        "use_sliding_window_attention": has_window,
    }


def gemma_config(
    *,
    intermediate_dim: int,
    layer_norm_epsilon: float,
    attention_logit_soft_cap: Any,
    final_logit_soft_cap: Any,
    use_sliding_window_attention: bool,
    sliding_window_size: int,
    use_post_attention_norm: bool,
    use_post_ffw_norm: bool,
    **sizes: Any,
) -> GemmaConfig:
    """The architecture of keras-hub's ``GemmaBackbone``: Gemma 1, or 2 if it has post norms."""
    has_post_norms = use_post_attention_norm or use_post_ffw_norm
    family = Family.GEMMA2 if has_post_norms else Family.GEMMA
    return GemmaConfig(
        family=family,
        # Both gating matrices are counted; an odd number is rounded down, as there.
        feed_forward_dim=intermediate_dim // 2,
        use_post_attention_norm=use_post_attention_norm,
        use_post_ffw_norm=use_post_ffw_norm,
        attention_soft_cap=_number(attention_logit_soft_cap),
        final_soft_cap=_number(final_logit_soft_cap),
        sliding_window_tokens=sliding_window_size if use_sliding_window_attention else None,
        global_layer_period=2 if use_sliding_window_attention else 1,
        # keras-hub passes it to the final norm and forgets it in the blocks.
        final_norm_epsilon=layer_norm_epsilon,
        context_tokens=TRAINED_CONTEXT_TOKENS[family],
        **sizes,
    )


def gemma3_config(
    *,
    intermediate_dim: int,
    layer_norm_epsilon: float,
    attention_logit_soft_cap: Any,
    final_logit_soft_cap: Any,
    use_sliding_window_attention: bool,
    sliding_window_size: int,
    use_query_key_norm: bool,
    use_post_attention_norm: bool,
    use_post_ffw_norm: bool,
    global_rope_scaling_factor: float,
    **sizes: Any,
) -> GemmaConfig:
    """The architecture of the text part of keras-hub's ``Gemma3Backbone``."""
    return GemmaConfig(
        family=Family.GEMMA3,
        feed_forward_dim=intermediate_dim,
        use_query_key_norm=use_query_key_norm,
        use_post_attention_norm=use_post_attention_norm,
        use_post_ffw_norm=use_post_ffw_norm,
        attention_soft_cap=_number(attention_logit_soft_cap),
        final_soft_cap=_number(final_logit_soft_cap),
        sliding_window_tokens=sliding_window_size if use_sliding_window_attention else None,
        global_layer_period=6 if use_sliding_window_attention else 1,
        global_rope_theta=1_000_000.0,
        global_rope_scale=global_rope_scaling_factor,
        final_norm_epsilon=layer_norm_epsilon,
        context_tokens=TRAINED_CONTEXT_TOKENS[Family.GEMMA3],
        **sizes,
    )


def _number(value: Any) -> Any:
    """A whole number as a float; what is no number as it is, for the config to refuse."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
