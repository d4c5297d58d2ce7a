"""`GemmaBackbone` and `Gemma3Backbone`: backbones with keras-hub's arguments and ways to disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import keras
from jaxtyping import Array

from model.backbone_lora import load_lora, save_lora
from model.config import Family, GemmaConfig
from model.gemma.backbone import Backbone
from model.gemma.keras_arguments import gemma3_config, gemma_config, keras_arguments
from model.gemma.layers import no_type_check
from model.preset_source import PresetSource, open_source
from model.preset_target import save_backbone
from model.presets.table import BUILTIN_PRESETS

Own = TypeVar("Own", bound="KerasBackbone")


class KerasBackbone(Backbone):
    """What both backbones of keras-hub have: a config, presets and LoRA files."""

    family_names: tuple[Family, ...] = ()
    # Every published preset by name; this class loads those of its own families.
    presets: Mapping[str, Any] = BUILTIN_PRESETS

    @classmethod
    def from_preset(
        cls: type[Own], preset: str, load_weights: bool = True, **arguments: Any
    ) -> Own:
        """The backbone of a preset.

        Args:
            preset: A published name (see `presets`), ``kaggle://…``, ``hf://…``, a Keras preset or
                Hugging Face directory, or a ``.gguf`` file.
            load_weights: False gives random weights, and needs no network for a published name.
            **arguments: dtype (Keras' global policy if left out, whatever the files hold), or any
                other argument of the constructor in place of the preset's own.

        Raises:
            ValueError: The preset is of another class, or the message says what else.
            PresetError: There is no such preset, or it cannot be had or read.
        """
        source = open_source(preset, load_weights=load_weights)
        return cls.from_source(source, load_weights=load_weights, **arguments)

    @classmethod
    def from_source(
        cls: type[Own], source: PresetSource, *, load_weights: bool, **arguments: Any
    ) -> Own:
        """`from_preset`, of a preset that is open."""
        known = cls if cls.family_names else class_of(source.config)
        if source.config.family not in known.family_names:
            raise ValueError(
                f"The preset is of {class_of(source.config).__name__}, not of {known.__name__}."
            )
        options = {key: arguments.pop(key) for key in list(arguments) if key in _OPTIONS}
        if arguments:
            if load_weights:
                raise ValueError(
                    f"{', '.join(sorted(arguments))} cannot differ from the preset's when its "
                    "weights are loaded. Pass load_weights=False."
                )
            return known(**{**keras_arguments(source.config), **arguments}, **options)
        arrays = None
        if load_weights:
            policy = keras.dtype_policies.get(options.get("dtype"))
            arrays = source.arrays(policy.variable_dtype)
        return known.of(source.config, arrays, **options)

    @classmethod
    def of(
        cls: type[Own],
        config: GemmaConfig,
        arrays: Mapping[str, Array] | None = None,
        **options: Any,
    ) -> Own:
        """A backbone of an architecture that is known as a config."""
        backbone = cls.__new__(cls)
        Backbone.__init__(backbone, config, arrays, **options)
        return backbone

    def save_to_preset(self, preset_dir: str | Path, max_shard_size: float | None = 10) -> None:
        """Writes config.json, metadata.json, task.json and the weights as keras-hub does.

        LoRA is merged into the kernels (spec 1.11).

        Args:
            preset_dir: A directory that does not exist.
            max_shard_size: Of one weights file, in GB; None never splits.
        """
        save_backbone(Path(preset_dir), self, max_shard_size=max_shard_size)

    def save_lora_weights(self, filepath: str | Path) -> None:
        """Writes a ``.lora.h5`` file for keras-hub; see `model.backbone_lora.save_lora`."""
        save_lora(Path(filepath), self)

    def load_lora_weights(self, filepath: str | Path) -> None:
        """Reads a ``.lora.h5`` file; see `model.backbone_lora.load_lora`."""
        load_lora(Path(filepath), self)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            **keras_arguments(self.config),
        }

    @classmethod
    def from_config(cls: type[Own], config: dict[str, Any], custom_objects: Any = None) -> Own:
        """A backbone with random weights from the arguments of `get_config`."""
        arguments = dict(config)
        if isinstance(arguments.get("dtype"), dict):
            arguments["dtype"] = keras.dtype_policies.deserialize(arguments["dtype"])
        return cls(**arguments)


class GemmaBackbone(KerasBackbone):
    """Gemma 1 and 2, with the arguments of keras-hub's class of that name.

    Args:
        vocabulary_size: V.
        num_layers: Decoder blocks.
        num_query_heads: N.
        num_key_value_heads: K; divides N.
        hidden_dim: D.
        intermediate_dim: **Twice** the width of each feed-forward matrix.
        head_dim: H, even.
        query_head_dim_normalize: Stored, and without effect, as in keras-hub: queries are always
            divided by sqrt(H).
        use_post_ffw_norm: RMSNorm on the feed-forward output.
        use_post_attention_norm: RMSNorm on the attention output.
        attention_logit_soft_cap: Or None.
        final_logit_soft_cap: Or None.
        use_sliding_window_attention: Whether every other layer, the first one included, sees a
            window only.
        sliding_window_size: Of those layers, in tokens.
        layer_norm_epsilon: Of the final norm; those in the blocks have 1e-6, as in keras-hub.
        dropout: Must be 0.
        query_pre_attention_scalar: Queries are divided by its root, in place of that of head_dim.
        **options: dtype, seed, name, trainable: see `Backbone`.

    Raises:
        TypeError: An argument that this class does not have.
        PresetFileInvalid: A value is out of range.
    """

    family_names = (Family.GEMMA, Family.GEMMA2)

    @no_type_check
    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_query_heads: int,
        num_key_value_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        head_dim: int,
        query_head_dim_normalize: bool = True,
        use_post_ffw_norm: bool = False,
        use_post_attention_norm: bool = False,
        attention_logit_soft_cap: float | None = None,
        final_logit_soft_cap: float | None = None,
        use_sliding_window_attention: bool = False,
        sliding_window_size: int = 4096,
        layer_norm_epsilon: float = 1e-6,
        dropout: float = 0,
        query_pre_attention_scalar: float | None = None,
        **options: Any,
    ) -> None:
        _check_options("GemmaBackbone", options)
        _check_dropout(dropout)
        config = gemma_config(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            head_dim=head_dim,
            layer_norm_epsilon=layer_norm_epsilon,
            attention_logit_soft_cap=attention_logit_soft_cap,
            final_logit_soft_cap=final_logit_soft_cap,
            use_sliding_window_attention=use_sliding_window_attention,
            sliding_window_size=sliding_window_size,
            use_post_attention_norm=use_post_attention_norm,
            use_post_ffw_norm=use_post_ffw_norm,
            query_pre_attention_scalar=query_pre_attention_scalar,
        )
        super().__init__(config, **options)


class Gemma3Backbone(KerasBackbone):
    """Gemma 3, text only, with the arguments of keras-hub's class of that name.

    Arguments not listed here are those of `GemmaBackbone`, but ``intermediate_dim`` is the width
    of **each** feed-forward matrix. Those of the vision encoder and of embedding models are known
    and must be off.

    Args:
        image_size: Without effect: there is no vision encoder.
        use_query_key_norm: RMSNorm on queries and keys.
        global_rope_scaling_factor: Positions of global layers are stretched by it.
        **options: dtype, seed, name, trainable: see `Backbone`.
    """

    family_names = (Family.GEMMA3,)

    @no_type_check
    def __init__(
        self,
        vocabulary_size: int,
        image_size: int | None,
        num_layers: int,
        num_query_heads: int,
        num_key_value_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        head_dim: int,
        query_head_dim_normalize: bool = True,
        use_query_key_norm: bool = True,
        use_post_ffw_norm: bool = False,
        use_post_attention_norm: bool = False,
        attention_logit_soft_cap: float | None = None,
        final_logit_soft_cap: float | None = None,
        use_sliding_window_attention: bool = False,
        sliding_window_size: int = 1024,
        local_rope_scaling_factor: float = 1.0,
        global_rope_scaling_factor: float = 1.0,
        vision_encoder: None = None,
        layer_norm_epsilon: float = 1e-6,
        use_bidirectional_attention: bool = False,
        dropout: float = 0,
        is_embedding_model: bool = False,
        pooling_intermediate_dim: int | None = None,
        embedding_dim: int | None = None,
        query_pre_attention_scalar: float | None = None,
        **options: Any,
    ) -> None:
        _check_options("Gemma3Backbone", options)
        _check_dropout(dropout)
        if vision_encoder is not None or use_bidirectional_attention or is_embedding_model:
            raise ValueError("Only causal text models are built: no vision encoder, no embeddings.")
        if local_rope_scaling_factor != 1.0:
            raise ValueError("local_rope_scaling_factor must be 1; no Gemma 3 scales local layers.")
        config = gemma3_config(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            head_dim=head_dim,
            layer_norm_epsilon=layer_norm_epsilon,
            attention_logit_soft_cap=attention_logit_soft_cap,
            final_logit_soft_cap=final_logit_soft_cap,
            use_sliding_window_attention=use_sliding_window_attention,
            sliding_window_size=sliding_window_size,
            use_query_key_norm=use_query_key_norm,
            use_post_attention_norm=use_post_attention_norm,
            use_post_ffw_norm=use_post_ffw_norm,
            global_rope_scaling_factor=global_rope_scaling_factor,
            query_pre_attention_scalar=query_pre_attention_scalar,
        )
        super().__init__(config, **options)


_OPTIONS = {"dtype", "seed", "name", "trainable"}


def _check_options(class_name: str, options: Mapping[str, Any]) -> None:
    if unknown := sorted(options.keys() - _OPTIONS):
        raise TypeError(
            f"{class_name} has no argument {', '.join(unknown)}. Heads are num_query_heads, "
            "num_key_value_heads and head_dim; there is no longest sequence."
        )


def _check_dropout(dropout: Any) -> None:
    if dropout:
        raise ValueError(f"dropout must be 0, got {dropout}: no Gemma is trained with it.")


def class_of(config: GemmaConfig) -> type[KerasBackbone]:
    """The class that Keras users know for this family."""
    return Gemma3Backbone if config.family is Family.GEMMA3 else GemmaBackbone
