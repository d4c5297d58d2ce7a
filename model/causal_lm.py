"""`GemmaCausalLM`: a backbone, its tied head and a preprocessor, as a Keras model.

A call takes token ids and returns logits. `fit`, `evaluate` and `predict` also take texts, which
the preprocessor turns into rows; `score` runs eagerly and lets a function see and replace the
residual stream at every layer.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jaxtyping import Array, Float

from model.gemma.backbone import GemmaBackbone, no_type_check
from model.gemma.forward import Intercept, forward
from model.preprocessor import GemmaCausalLMPreprocessor

_SCORING_MODES = ("logits", "loss")
_LEARNING_RATE = 2e-5


class GemmaCausalLM(keras.Model):
    """Predicts the next token at every position.

    Takes ``{"token_ids": int [B, T], "padding_mask": bool or int [B, T]}`` and returns logits
    [B, T, V].

    Args:
        backbone: The model.
        preprocessor: Turns texts into rows; without it every input must be rows of ids.
    """

    @no_type_check
    def __init__(
        self, backbone: GemmaBackbone, preprocessor: GemmaCausalLMPreprocessor | None = None
    ) -> None:
        super().__init__(name="gemma_causal_lm", dtype=backbone.dtype_policy)
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.built = True
        self.compile()

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        **kwargs: Any,
    ) -> None:
        """Like `keras.Model.compile`, where "auto" is Adam at 2e-5, sparse cross-entropy from
        logits, and weighted accuracy (spec 2.5)."""
        if optimizer == "auto":
            optimizer = keras.optimizers.Adam(_LEARNING_RATE)
        if loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy()]
        super().compile(optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, **kwargs)

    def call(
        self, inputs: Mapping[str, Array], training: bool = False
    ) -> Float[Array, "batch seq vocab"]:
        """Logits."""
        return forward(
            self.backbone.config,
            self.backbone.gemma_weights,
            jnp.asarray(inputs["token_ids"], jnp.int32),
            jnp.asarray(inputs["padding_mask"]).astype(bool),
        ).logits

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        validation_data: Any = None,
        **kwargs: Any,
    ) -> Any:
        """`keras.Model.fit` on texts, or on rows of ids with labels. Returns the `History`."""
        if validation_data is not None and self._is_text(validation_data):
            validation_data = self._rows(validation_data)
        x, y, sample_weight = self._inputs(x, y, sample_weight)
        return super().fit(
            x=x,
            y=y,
            batch_size=batch_size,
            sample_weight=sample_weight,
            validation_data=validation_data,
            **kwargs,
        )

    def evaluate(
        self, x: Any = None, y: Any = None, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        """`keras.Model.evaluate` on texts, or on rows of ids with labels."""
        x, y, sample_weight = self._inputs(x, y, sample_weight)
        return super().evaluate(x=x, y=y, sample_weight=sample_weight, **kwargs)

    def predict(self, x: Any, **kwargs: Any) -> Any:
        """Logits of texts, or of rows of ids."""
        x, _, _ = self._inputs(x, None, None)
        return super().predict(x, **kwargs)

    def score(
        self,
        token_ids: Any,
        padding_mask: Any = None,
        scoring_mode: str = "logits",
        layer_intercept_fn: Intercept | None = None,
        target_ids: Any = None,
    ) -> Array:
        """How likely the model finds given tokens; differentiable with `jax.grad`.

        Args:
            token_ids: [B, T].
            padding_mask: [B, T], False or 0 where a token is padding; none is if left out.
            scoring_mode: "logits" for [B, T, V], "loss" for the cross-entropy [B, T] in nats of
                ``target_ids[b, t]`` under the logits at position t: no shift, no mask, no mean.
            layer_intercept_fn: Called with the residual stream and its layer: −1 for the unscaled
                embeddings, then each block in order. What it returns goes on.
            target_ids: [B, T], for "loss".

        Raises:
            ValueError: Another mode, "loss" without targets, or ids of another rank.
        """
        if scoring_mode not in _SCORING_MODES:
            raise ValueError(
                f"scoring_mode must be 'logits' or 'loss', got {str(scoring_mode)[:40]!r}."
            )
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError("scoring_mode 'loss' needs target_ids.")
        ids = jnp.asarray(token_ids, jnp.int32)
        if ids.ndim != 2:
            raise ValueError(f"token_ids must be [batch, tokens], got shape {ids.shape}.")
        mask = jnp.ones(ids.shape, bool) if padding_mask is None else jnp.asarray(padding_mask)
        logits = forward(
            self.backbone.config,
            self.backbone.gemma_weights,
            ids,
            mask.astype(bool),
            intercept=layer_intercept_fn,
        ).logits
        if scoring_mode == "logits":
            return logits
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        targets = jnp.asarray(target_ids, jnp.int32)[..., None]
        return -jnp.take_along_axis(logprobs, targets, axis=-1)[..., 0]

    def _is_text(self, x: Any) -> bool:
        if isinstance(x, str):
            return True
        return isinstance(x, (list, tuple)) and bool(x) and all(isinstance(t, str) for t in x)

    def _rows(self, x: Any) -> Any:
        if self.preprocessor is None:
            raise ValueError("Texts need a preprocessor; this model has none. Pass token ids.")
        return self.preprocessor([x] if isinstance(x, str) else x)

    def _inputs(self, x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        """Texts as rows with their own labels; anything else as it is."""
        return tuple(self._rows(x)) if self._is_text(x) else (x, y, sample_weight)
