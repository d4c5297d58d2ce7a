"""The sums of attribution: a derivative at one place, or along a line from zero to it."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from model.attribution_passes import AttributionPasses, NotFinite, Stream
from model.attribution_questions import AttributedText, Attribution, AttributionQuestion, passes
from model.chunk_stream import ChunkStreams
from model.config import GemmaConfig
from model.gemma.block import LayerTraits
from model.gemma.forward import EMBEDDING_LAYER
from model.gemma.weights import GemmaWeights
from model.integration_path import IntegrationPath
from model.logits_room import LogitsRoom
from model.programs import ProgramSpec

# The error of completeness is not told relative to a change smaller than this.
_LEAST_CHANGE = 1e-6

Parts = Float64[np.ndarray, "tokens width"]


class Attributions:
    """The attributions of one engine.

    Args:
        config: Of the model.
        weights: Of the model.
        traits: Of the layers.
        programs: Of the engine, filled by it.
        streams: Of the engine: how the residual stream is changed.
        room: For logits.
        is_native: Products are the native kernel's.
    """

    def __init__(
        self,
        config: GemmaConfig,
        weights: GemmaWeights,
        traits: Sequence[LayerTraits],
        programs: dict[str, Callable[..., Any]],
        streams: ChunkStreams,
        room: LogitsRoom,
        *,
        is_native: bool,
    ) -> None:
        self._width = config.hidden_dim
        self._room = room
        self._passes = AttributionPasses(
            config, weights, traits, programs, streams, room, is_native=is_native
        )

    def program_specs(self) -> list[ProgramSpec]:
        """What is to be compiled."""
        return self._passes.program_specs()

    def warm_up(self) -> None:
        """Runs every program once; see `model.engine`."""
        self._passes.warm_up()

    def attribute(self, question: AttributionQuestion) -> Generator[bool, None, Attribution]:
        """See `model.attribution_questions.AttributionEngine`."""
        found = _Found(question, self._width)
        try:
            for text in question.texts:
                stream = yield from self._passes.stream_at(text, question.layer)
                found.note_stream(stream)
                line = _Line(self._passes, text, stream, question.layer)
                if question.num_steps:
                    yield from _integrate(line, found)
                else:
                    [derivative] = yield from line.derivatives([1.0])
                    found.add(derivative.astype(np.float64))
        except NotFinite:
            return Attribution(b"", is_finite=False)
        finally:
            self._room.shrink()
        return found.answer()


class _Line:
    """Multiples of the residual stream of one text at one layer."""

    def __init__(
        self, passes_: AttributionPasses, text: AttributedText, stream: Stream, layer: int
    ) -> None:
        self.stream = stream
        self._passes = passes_
        self._text = text
        self._layer = layer

    def values(self, scales: Sequence[float]) -> Generator[bool, None, dict[float, float]]:
        """The sum of log-probabilities at each scale."""
        found: list[float] = []
        for size in passes(self._text.num_read, len(scales)):
            streams = self._at(scales[len(found) :][: size.num_rows])
            result = yield from self._passes.run(
                self._text, streams, size, self._layer, wants_derivative=False
            )
            found += result.logprobs.tolist()
            yield True
        return dict(zip(scales, found, strict=True))

    def derivatives(self, scales: Sequence[float]) -> Generator[bool, None, list[Stream]]:
        """Its derivative by the stream at each scale."""
        found: list[Stream] = []
        for size in passes(self._text.num_read, len(scales)):
            streams = self._at(scales[len(found) :][: size.num_rows])
            result = yield from self._passes.run(
                self._text, streams, size, self._layer, wants_derivative=True
            )
            assert result.by_stream is not None, "it was wanted"
            found += list(result.by_stream)
            yield True
        return found

    def _at(self, scales: Sequence[float]) -> np.ndarray:
        streams: np.ndarray = np.array(scales, np.float32)[:, None, None] * self.stream
        return streams


def _integrate(line: _Line, found: "_Found") -> Generator[bool, None, None]:
    """What each number of the stream adds to the change along the line."""
    path = IntegrationPath(found.question.num_steps)
    while wanted := path.wanted_values():
        path.note_values((yield from line.values(wanted)))
    kept: dict[float, Stream] = {}
    while wanted := path.wanted_slopes():
        # Of steps that are halved now, it would only take room.
        live = {step.scale for step in path.steps}
        kept = {scale: each for scale, each in kept.items() if scale in live}
        taken = yield from line.derivatives(wanted)
        slopes = [float(np.vdot(each, line.stream)) for each in taken]
        path.note_slopes(dict(zip(wanted, slopes, strict=True)))
        kept |= zip(wanted, taken, strict=True)
    added = np.zeros(line.stream.shape)
    for step in path.steps:
        added += step.length * kept[step.scale]
    found.add(added * line.stream)
    found.change += path.change


class _Found:
    """What was found for the texts so far.

    Attributes:
        question: What was asked.
        change: Of the log-probabilities along the lines.
    """

    def __init__(self, question: AttributionQuestion, width: int) -> None:
        self.question = question
        self.change = 0.0
        self._parts = np.zeros((question.num_told, width))
        self._stream = np.zeros((question.num_told, width))
        self._total = 0.0

    def note_stream(self, stream: Stream) -> None:
        """Of a text; the tokens that are told have the same in all of them."""
        told = stream[: self.question.num_told]
        self._stream[: len(told)] = told

    def add(self, parts: Parts) -> None:
        """Of a text, for each number of its stream."""
        told = parts[: self.question.num_told]
        self._parts[: len(told)] += told
        self._total += float(parts.sum())

    def answer(self) -> Attribution:
        """For all texts together."""
        numbers = self._reduced() * (-1.0 if self.question.is_loss else 1.0)
        if not np.isfinite(numbers).all():
            return Attribution(b"", is_finite=False)
        error = None
        if self.question.num_steps:
            error = abs(self._total - self.change) / max(abs(self.change), _LEAST_CHANGE)
        return Attribution(numbers.astype("<f4").tobytes(), error)

    def _reduced(self) -> Float64[np.ndarray, "..."]:
        """In units of the stream at the layer: embeddings are meant before they are scaled."""
        parts, is_gradient = self._parts, self.question.num_steps == 0
        if self.question.reduction == "dot_input":
            dots: np.ndarray = (parts * self._stream if is_gradient else parts).sum(axis=1)
            return dots
        if is_gradient and self.question.layer == EMBEDDING_LAYER:
            parts = parts * np.sqrt(parts.shape[1])
        return np.linalg.norm(parts, axis=1) if self.question.reduction == "l2" else parts
