"""One output on its way: which token comes next, when it ends, and what may be sent of it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from model.detokenizer import StreamingDetokenizer
from model.slots import DecodeRow, RowRules, SampledToken, Sampling, TextCodec
from service.protocol.messages import (
    FinishReason,
    OutputEnd,
    Piece,
    StopRules,
    TokenLogprobs,
)
from service.worker.actions import Row
from service.worker.interventions import NO_INTERVENTIONS, PromptInterventions
from service.worker.translate import token_logprobs


@dataclass(frozen=True, slots=True)
class Step:
    """What new tokens did: something to send, and how the output ended if it did."""

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
        prefix_keys: Of the whole blocks of the prompt before its last token.
        interventions: In the prompt and in what is drawn.
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
        prefix_keys: tuple[bytes, ...] = (),
        interventions: PromptInterventions = NO_INTERVENTIONS,
    ) -> None:
        self.row = row
        self.prompt = prompt
        self.end: OutputEnd | None = None
        self.num_tokens = 0
        self.prefix_keys = prefix_keys
        self.interventions = interventions
        # Of the steps that were started; some may not be read yet.
        self._num_steps = 0
        self._stop = stop
        self._codec = codec
        eos_ids = () if stop.ignore_eos else codec.stop_ids
        self._stop_ids = frozenset((*eos_ids, *stop.token_ids))
        self._rules = RowRules(
            sampling=sampling,
            num_prompt=len(prompt),
            end=len(prompt) + stop.max_tokens,
            stop_ids=tuple(sorted(self._stop_ids)),
            may_stop_at=len(prompt) + stop.min_tokens,
            num_logprobs=num_logprobs,
            interventions=interventions.steps,
        )
        self._detokenizer = StreamingDetokenizer(codec.piece_bytes, stop.strings)
        # A stop string in the prompt stops nothing, and is text.
        echoed = prompt if echo else ()
        self._unsent = "".join(self._detokenizer.add(id_, may_stop=False) for id_ in echoed)

    @property
    def num_steps_left(self) -> int:
        """Steps that may still be started for it."""
        return self._stop.max_tokens - self._num_steps

    @property
    def may_be_stopping(self) -> bool:
        """Whether text is held back that the next token may complete to a stop string."""
        return self._detokenizer.holds_part_of_stop

    def decode_row(self, num_steps: int) -> DecodeRow:
        """This output's row of a dispatch of so many steps, which is then counted as started."""
        assert self.row.slot is not None, "only a row with a slot decodes"
        position = len(self.prompt) - 1 + self._num_steps
        self._num_steps = min(self._num_steps + num_steps, self._stop.max_tokens)
        return DecodeRow(self.row.slot, position, self._rules, self.row.adapter_slot)

    def banned_ids(self, num_tokens: int) -> tuple[int, ...]:
        """What must not come behind ``num_tokens`` tokens: an end that is too early."""
        return () if num_tokens >= self._stop.min_tokens else self._rules.stop_ids

    def fork(self) -> "Completion":
        """Another output with the same tokens, which may get others from here on."""
        twin = copy.copy(self)
        twin._detokenizer = self._detokenizer.fork()
        return twin

    def take(self, tokens: Sequence[SampledToken]) -> Step:
        """Adds sampled tokens, up to the one that ends the output; those behind it never were."""
        assert self.end is None, "a token after the end"
        text = self._take_unsent()
        taken: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for token in tokens:
            taken.append(token.token_id)
            if token.logprob is not None:
                logprobs.append(token_logprobs(token, self._codec))
            text += self._add(token.token_id)
            if self.end is not None:
                break
        piece = Piece(
            request_id=self.row.key.request_id,
            output=self.row.key.output,
            token_ids=tuple(taken),
            text=text,
            logprobs=tuple(logprobs),
        )
        return Step(piece, self.end)

    def _add(self, token_id: int) -> str:
        """The text that one more token makes safe to send."""
        self.num_tokens += 1
        # A token that stops is counted and has its id sent, but adds no text.
        text = "" if token_id in self._stop_ids else self._add_text(token_id)
        return text + self._end_if_due(token_id)

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
