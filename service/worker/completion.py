"""One output on its way: which token comes next, when it ends, and what may be sent of it."""

from dataclasses import dataclass

from model.detokenizer import StreamingDetokenizer
from model.slots import DecodeRow, SampledToken, Sampling, TextCodec
from service.protocol.messages import FinishReason, OutputEnd, Piece, StopRules
from service.worker.scheduler import Row
from service.worker.translate import token_logprobs


@dataclass(frozen=True, slots=True)
class Step:
    """What one token did: something to send, and how the output ended if it did."""

    piece: Piece
    end: OutputEnd | None


class Completion:
    """The state of one output beside its place in the scheduler.

    Args:
        row: Its place.
        prompt: Token ids, at least one.
        sampling: With this output's own seed.
        stop: When it ends.
        num_logprobs: None, or alternatives per token.
        codec: Of the engine.
        echo: Whether the text begins with the prompt.
    """

    def __init__(
        self,
        row: Row,
        prompt: tuple[int, ...],
        sampling: Sampling,
        stop: StopRules,
        num_logprobs: int | None,
        codec: TextCodec,
        *,
        echo: bool = False,
    ) -> None:
        self.row = row
        self.prompt = prompt
        self.end: OutputEnd | None = None
        self.num_tokens = 0
        self._newest = prompt[-1]
        # Kept only where what was generated changes what comes next.
        self._generated: list[int] = []
        self._sampling = sampling
        self._stop = stop
        self._num_logprobs = num_logprobs
        self._codec = codec
        eos_ids = () if stop.ignore_eos else codec.stop_ids
        self._stop_ids = frozenset((*eos_ids, *stop.token_ids))
        self._detokenizer = StreamingDetokenizer(codec.piece_bytes, stop.strings)
        # A stop string in the prompt stops nothing, and is text.
        echoed = prompt if echo else ()
        self._unsent = "".join(self._detokenizer.add(id_, may_stop=False) for id_ in echoed)

    def decode_row(self) -> DecodeRow:
        """This output's row of the next decode step."""
        assert self.row.slot is not None, "only a row with a slot decodes"
        may_stop = self.num_tokens >= self._stop.min_tokens
        has_penalties = self._sampling.has_penalties
        return DecodeRow(
            slot=self.row.slot,
            token_id=self._newest,
            position=len(self.prompt) - 1 + self.num_tokens,
            sampling=self._sampling,
            banned_ids=() if may_stop else tuple(sorted(self._stop_ids)),
            num_logprobs=self._num_logprobs,
            prompt=self.prompt if has_penalties else (),
            generated=self._generated if has_penalties else (),
        )

    def take(self, token: SampledToken) -> Step:
        """Adds one sampled token."""
        assert self.end is None, "a token after the end"
        self._newest = token.token_id
        self.num_tokens += 1
        if self._sampling.has_penalties:
            self._generated.append(token.token_id)
        # A token that stops is counted and has its id sent, but adds no text.
        text = self._take_unsent()
        if token.token_id not in self._stop_ids:
            text += self._add_text(token.token_id)
        text += self._end_if_due(token.token_id)
        piece = Piece(
            request_id=self.row.key.request_id,
            output=self.row.key.output,
            token_ids=(token.token_id,),
            text=text,
            logprobs=(token_logprobs(token, self._codec),) if token.logprob is not None else (),
        )
        return Step(piece, self.end)

    def cut(self, reason: FinishReason) -> Piece:
        """Ends the output from outside; the piece holds text that was held back."""
        assert self.end is None, "ended twice"
        self._finish(reason, None)
        text = self._take_unsent() + self._detokenizer.finish()
        return Piece(self.row.key.request_id, self.row.key.output, (), text, ())

    def _take_unsent(self) -> str:
        text, self._unsent = self._unsent, ""
        return text

    def _add_text(self, token_id: int) -> str:
        return self._detokenizer.add(token_id, may_stop=self.num_tokens >= self._stop.min_tokens)

    def _end_if_due(self, token_id: int) -> str:
        """Ends the output if this token does, and returns the text that was held back."""
        if self._detokenizer.stopped_by is not None:
            self._finish("stop", self._detokenizer.stopped_by)
        elif token_id in self._stop_ids:
            rest = self._detokenizer.finish()
            self._finish("stop", self._detokenizer.stopped_by or token_id)
            return rest
        elif self.num_tokens >= self._stop.max_tokens:
            rest = self._detokenizer.finish()
            stopped_by = self._detokenizer.stopped_by
            self._finish("length" if stopped_by is None else "stop", stopped_by)
            return rest
        return ""

    def _finish(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        self.end = OutputEnd(reason, stop_reason, self.num_tokens)
