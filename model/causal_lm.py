"""`GemmaCausalLM`: a backbone, its tied head and a preprocessor, as a Keras model.

A call takes token ids and returns logits. `fit`, `evaluate` and `predict` also take texts, which
the preprocessor turns into rows; `generate` and `stream` continue texts with the sampler that
`compile` was given; `score` runs eagerly and lets a function see and replace the residual stream at
every layer.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from model.config import Family
from model.detokenizer import StreamingDetokenizer
from model.gemma.backbone import Backbone
from model.gemma.forward import Intercept
from model.gemma.layers import no_type_check
from model.generate_inputs import Prompts, generate_inputs
from model.generate_outputs import concatenated, until_stop, without_prompt
from model.generation import Generator, padded_rows
from model.keras_backbone import KerasBackbone
from model.preprocessor import GemmaCausalLMPreprocessor
from model.preset_source import open_source
from model.preset_target import export_backbone, save_backbone
from model.presets.table import BUILTIN_PRESETS
from model.samplers.beam import BeamSampler
from model.samplers.registry import get as get_sampler
from model.scoring import score

_LEARNING_RATE = 2e-5
# None says that there shall be no preprocessor.
_OF_THE_PRESET: Any = object()


class CausalLM(keras.Model):
    """A causal language model of any family that there is; `from_preset` makes one."""

    # Every published preset by name.
    presets: Mapping[str, Any] = BUILTIN_PRESETS

    @classmethod
    def from_preset(
        cls,
        preset: str,
        load_weights: bool = True,
        *,
        preprocessor: Any = _OF_THE_PRESET,
        compile: bool = True,
        **arguments: Any,
    ) -> "GemmaCausalLM":
        """The model of a preset, with its preprocessor.

        Args:
            preset: A published name (see `presets`), ``kaggle://…``, ``hf://…``, a Keras preset or
                Hugging Face directory, or a ``.gguf`` file.
            load_weights: False gives random weights, and needs no network for a published name;
                without a download there is no preprocessor either.
            preprocessor: In place of the preset's own; None for rows of ids.
            compile: Whether to compile with the defaults at once.
            **arguments: dtype (Keras' global policy if left out, whatever the files hold); with
                ``load_weights=False`` any argument of the backbone, in place of the preset's own.

        Raises:
            ValueError: An argument that cannot be honoured.
            PresetError: There is no such preset, or it cannot be had or read.
        """
        source = open_source(preset, load_weights=load_weights)
        backbone = KerasBackbone.from_source(source, load_weights=load_weights, **arguments)
        if preprocessor is _OF_THE_PRESET:
            preprocessor = GemmaCausalLMPreprocessor.from_source(source)
        known = cls if issubclass(cls, GemmaCausalLM) else GemmaCausalLM
        return known(backbone, preprocessor, compile=compile)


class GemmaCausalLM(CausalLM):
    """Predicts the next token at every position.

    Takes ``{"token_ids": int [B, T], "padding_mask": bool or int [B, T]}`` and returns logits
    [B, T, V].

    Args:
        backbone: The model.
        preprocessor: Turns texts into rows; without it every input must be rows of ids.
        compile: Whether to compile with the defaults at once.
        name: Of the model.
    """

    @no_type_check
    def __init__(
        self,
        backbone: Backbone,
        preprocessor: GemmaCausalLMPreprocessor | None = None,
        *,
        compile: bool = True,
        name: str | None = None,
    ) -> None:
        inputs = backbone.input
        logits = backbone.token_embedding(backbone(inputs), reverse=True)
        own_name = backbone.name.replace("_backbone", "_causal_lm")
        super().__init__(inputs=inputs, outputs=logits, name=name or own_name)
        self.dtype_policy = backbone.dtype_policy
        self.backbone = backbone
        self.preprocessor = preprocessor
        self._generator: Generator | None = None
        if compile:
            self.compile()

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        sampler: Any = "greedy",
        **kwargs: Any,
    ) -> None:
        """Like `keras.Model.compile`, where "auto" is Adam at 2e-5, sparse cross-entropy from
        logits, and weighted accuracy (spec 2.5).

        Args:
            optimizer: Any of Keras.
            loss: Any of Keras.
            weighted_metrics: Any of Keras.
            sampler: For `generate`: a name, a config, a `samplers.Sampler` or another callable with
                the arguments of its call.
            **kwargs: As for `keras.Model.compile`.
        """
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = keras.optimizers.Adam(_LEARNING_RATE)
        if isinstance(loss, str) and loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if isinstance(weighted_metrics, str) and weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy()]
        super().compile(optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, **kwargs)
        self.sampler = get_sampler(sampler)
        self._generator = None

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        strip_prompt: bool = False,
    ) -> Any:
        """Continues prompts.

        Args:
            inputs: A text; a list of texts, which is one batch; without a preprocessor a dict with
                token_ids and padding_mask [B, T], where the mask is True on tokens that must stay;
                or a dataset: anything that yields such batches.
            max_length: Tokens of a row, prompt included; the preprocessor's ``sequence_length`` if
                left out. A longer prompt is cut. Ignored without a preprocessor.
            stop_token_ids: Ids that end a row; "auto" are those of the tokenizer, None never stops.
            strip_prompt: Return what was generated, without the prompt.

        Returns:
            A text for a text, a list of texts for texts or a dataset, a dict of arrays for dicts.
            A `BeamSampler` with ``return_all_beams`` gives a list of texts, likeliest first, for
            each prompt; or arrays with an axis of beams, and their ``log_probs``.

        Raises:
            ValueError: The input cannot be used; the message says where and why.
        """
        stops = self._stop_token_ids(stop_token_ids)
        batches, is_single = self._prompts(inputs, max_length)
        outputs = [self._generate_batch(prompts, stops, strip_prompt) for prompts in batches]
        if not outputs:
            raise ValueError("There is nothing to generate from: the dataset is empty.")
        if self.preprocessor is None:
            return concatenated(outputs)
        texts = [text for output in outputs for text in self._texts(output)]
        return texts[0] if is_single else texts

    def stream(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        strip_prompt: bool = False,
    ) -> Iterator[str]:
        """The text that `generate` returns for one text, piece by piece as it is drawn.

        Joined, the pieces are that text; the first one is the prompt unless it is stripped. A
        sampler that decides over several tokens at once, as beam search, yields its text at its
        end. Arguments and errors are those of `generate`.
        """
        stops = self._stop_token_ids(stop_token_ids)
        batches, is_single = self._prompts(inputs, max_length)
        if not is_single:
            raise ValueError("stream takes one text; use generate for several.")
        if self._returns_all_beams():
            raise ValueError("A sampler that returns all beams cannot be streamed.")
        return self._pieces(next(batches), stops, strip_prompt)

    def _pieces(
        self, prompts: Prompts, stops: tuple[int, ...], strip_prompt: bool
    ) -> Iterator[str]:
        assert self.preprocessor is not None, "a text came through it"
        detokenizer = StreamingDetokenizer(self.preprocessor.tokenizer.piece_bytes, ())
        prompt_ids = prompts.token_ids[0][prompts.padding_mask[0]].tolist()
        if not strip_prompt:
            yield from _not_empty(["".join(map(detokenizer.add, prompt_ids))])
        rows = padded_rows(*prompts, stops)
        for column in self._compiled().stream(self.backbone.gemma_weights, rows):
            yield from _not_empty([detokenizer.add(int(column[0]))])
            if int(column[0]) in stops:
                break
        yield from _not_empty([detokenizer.finish()])

    def _prompts(self, inputs: Any, max_length: int | None) -> tuple[Iterator[Prompts], bool]:
        vocabulary_size = self.backbone.config.vocabulary_size
        return generate_inputs(
            inputs, self.preprocessor, max_length=max_length, vocabulary_size=vocabulary_size
        )

    def _compiled(self) -> Generator:
        if not getattr(self, "compiled", False) or self.sampler is None:
            raise ValueError("You must call `compile()` with a sampler before `generate()`.")
        if self._generator is None:
            self._generator = Generator(
                self.backbone.config, self.sampler, run_eagerly=bool(self.run_eagerly)
            )
        return self._generator

    def _generate_batch(
        self, prompts: Prompts, stops: tuple[int, ...], strip_prompt: bool
    ) -> dict[str, NDArray[Any]]:
        """Rows as keras-hub returns them: the mask ends with the first stop of each row."""
        result = self._compiled().fill(self.backbone.gemma_weights, padded_rows(*prompts, stops))
        length = prompts.token_ids.shape[1]
        more = {}
        if self._returns_all_beams():
            result, logprobs = result
            more["log_probs"] = np.asarray(logprobs)
        token_ids = np.asarray(result)[..., :length]
        is_prompt = prompts.padding_mask
        if token_ids.ndim == 3:
            is_prompt = np.broadcast_to(is_prompt[:, None], token_ids.shape)
        mask = until_stop(token_ids, is_prompt, stops)
        if strip_prompt:
            token_ids, mask = without_prompt(token_ids, mask, is_prompt)
        return {"token_ids": token_ids, "padding_mask": mask, **more}

    def _returns_all_beams(self) -> bool:
        return isinstance(self.sampler, BeamSampler) and self.sampler.return_all_beams

    def _texts(self, output: Mapping[str, NDArray[Any]]) -> list[Any]:
        assert self.preprocessor is not None
        token_ids, mask = output["token_ids"], output["padding_mask"]
        if token_ids.ndim == 2:
            rows = zip(token_ids, mask, strict=True)
            return [self._text(ids, kept) for ids, kept in rows]
        beams = zip(token_ids, mask, strict=True)
        return [self._texts({"token_ids": ids, "padding_mask": kept}) for ids, kept in beams]

    def _text(self, token_ids: NDArray[Any], mask: NDArray[Any]) -> Any:
        assert self.preprocessor is not None
        return self.preprocessor.generate_postprocess(
            {"token_ids": token_ids, "padding_mask": mask}
        )

    def _stop_token_ids(self, stop_token_ids: Any) -> tuple[int, ...]:
        """The ids; none of them for None."""
        if stop_token_ids is None:
            return ()
        if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
            if self.preprocessor is None:
                raise ValueError(
                    'stop_token_ids="auto" are those of the tokenizer, and this model has no '
                    "preprocessor. Pass stop_token_ids=None to fill whole rows, or a tuple of ids."
                )
            return self._usual_stops(self.preprocessor)
        if isinstance(stop_token_ids, (str, bytes)) or not hasattr(stop_token_ids, "__len__"):
            raise ValueError(
                'stop_token_ids must be "auto", None or a tuple of ids, got '
                f"{stop_token_ids!r:.60}."
            )
        size = self.backbone.config.vocabulary_size
        stops = tuple(int(token_id) for token_id in stop_token_ids)
        for token_id in stops:
            if not 0 <= token_id < size:
                raise ValueError(f"The stop id {token_id} is not in [0, {size}).")
        return stops

    def _usual_stops(self, preprocessor: GemmaCausalLMPreprocessor) -> tuple[int, ...]:
        """<eos>; for Gemma 3 <end_of_turn> as well, as in keras-hub."""
        tokenizer = preprocessor.tokenizer
        stops = [tokenizer.end_token_id]
        if self.backbone.config.family is Family.GEMMA3:
            end_of_turn = tokenizer.token_to_id("<end_of_turn>")
            if tokenizer.id_to_token(end_of_turn) == "<end_of_turn>":
                stops.append(end_of_turn)
        return tuple(stops)

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
        x, y, sample_weight = self._as_rows(x, y, sample_weight)
        self._check_optimizer()
        return super().fit(
            x=x,
            y=y,
            batch_size=batch_size,
            sample_weight=sample_weight,
            validation_data=validation_data,
            **kwargs,
        )

    def _check_optimizer(self) -> None:
        optimizer = getattr(self, "optimizer", None)
        if optimizer is None or not optimizer.built:
            return
        trained = {id(variable) for variable in optimizer._trainable_variables}
        if trained != {id(variable) for variable in self.trainable_variables}:
            raise ValueError(
                "Other weights are trainable now than when the optimizer was first used, perhaps "
                "since enable_lora(). Call compile() again."
            )

    def evaluate(
        self, x: Any = None, y: Any = None, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        """`keras.Model.evaluate` on texts, or on rows of ids with labels."""
        x, y, sample_weight = self._as_rows(x, y, sample_weight)
        return super().evaluate(x=x, y=y, sample_weight=sample_weight, **kwargs)

    def predict(self, x: Any, **kwargs: Any) -> Any:
        """Logits of texts, or of rows of ids."""
        x, _, _ = self._as_rows(x, None, None)
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
        return score(
            self.backbone.config,
            self.backbone.gemma_weights,
            token_ids,
            padding_mask,
            scoring_mode,
            layer_intercept_fn,
            target_ids,
        )

    def save_to_preset(self, preset_dir: str | Path, max_shard_size: float | None = 10) -> None:
        """Writes a preset directory that keras-hub loads; LoRA is merged into the kernels.

        Args:
            preset_dir: A directory that does not exist.
            max_shard_size: Of one weights file, in GB; None never splits.

        Raises:
            PresetError: The directory exists, or cannot be written.
        """
        preprocessor = self.preprocessor
        save_backbone(
            Path(preset_dir),
            self.backbone,
            tokenizer_proto=None if preprocessor is None else preprocessor.tokenizer.proto,
            preprocessing=None if preprocessor is None else preprocessor.preprocessing,
            max_shard_size=max_shard_size,
        )

    def export_to_transformers(self, path: str | Path) -> None:
        """Writes a Hugging Face directory that transformers loads; LoRA is merged.

        Raises:
            ValueError: There is no preprocessor, and so no tokenizer to write.
            PresetError: The directory exists, or cannot be written.
        """
        if self.preprocessor is None:
            raise ValueError("A Hugging Face directory has a tokenizer; this model has none.")
        export_backbone(Path(path), self.backbone, self.preprocessor.tokenizer.proto)

    def _is_text(self, x: Any) -> bool:
        if isinstance(x, str) or (isinstance(x, Mapping) and "prompts" in x):
            return True
        return isinstance(x, (list, tuple)) and bool(x) and all(isinstance(t, str) for t in x)

    def _rows(self, x: Any) -> Any:
        if self.preprocessor is None:
            raise ValueError("Texts need a preprocessor; this model has none. Pass token ids.")
        return self.preprocessor([x] if isinstance(x, str) else x)

    def _as_rows(self, x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        """Texts as rows with their own labels; anything else as it is."""
        return tuple(self._rows(x)) if self._is_text(x) else (x, y, sample_weight)


def _not_empty(pieces: Any) -> Iterator[str]:
    return (piece for piece in pieces if piece)
