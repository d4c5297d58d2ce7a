"""What a request of scores asks, as passages to read: texts to ids, and what is asked behind which.

A context is read once for all of its targets. The tokens of a target are those of context and
target together, behind as many as the context has alone. Where joining them changes the last tokens
of the context, that target gets a passage of its own, so that it is read as it is written.

A continuation that is longer than a block gets one too: in the rings of local layers it would stand
where the others still look.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from model.slots import EngineInfo, TextCodec
from service.protocol.messages import Score, ScoredContext, ScoredIds, ScoredText
from service.worker.score_line import Asked, ScorePiece, TargetToken

# Tokens that an answer tells, alternatives included: it must fit a frame.
MAX_TOLD_TOKENS = 131_072
# Places whose logits one answer may hold.
MAX_LOGIT_PLACES = 16
# Of contexts, once for each of their targets, and targets: all of it is tokenised before the next
# request is looked at.
MAX_JOINED_BYTES = 2 * 1024 * 1024


class InvalidInput(Exception):
    """An input that cannot be scored, and where that is."""

    def __init__(self, code: str, detail: str, pointer: str) -> None:
        super().__init__(code)
        self.code = code
        self.detail = detail
        self.pointer = pointer


@dataclass(frozen=True, slots=True)
class PlannedTarget:
    """Token ids of a target, their positions in its text, and all ids of that."""

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    num_bytes: int
    text_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlannedInput:
    """One input: its targets, and the pieces of every passage that is read for them."""

    num_prompt_tokens: int
    targets: tuple[PlannedTarget, ...]
    passages: tuple[tuple[ScorePiece, ...], ...]


class ScoreInputs:
    """Plans inputs for one engine.

    Args:
        info: Of the engine.
        codec: Of the engine.
    """

    def __init__(self, info: EngineInfo, codec: TextCodec) -> None:
        self._info = info
        self._codec = codec

    def plan(self, command: Score) -> list[PlannedInput]:
        """Every input of a request.

        Raises:
            InvalidInput: One cannot be scored.
        """
        joined_bytes = sum(
            len(each.targets) * len(each.context.encode()) + sum(map(len, each.targets))
            for each in command.inputs
            if isinstance(each, ScoredContext)
        )
        if joined_bytes > MAX_JOINED_BYTES:
            detail = (
                f"Contexts, once for each of their targets, have {joined_bytes} bytes; a request "
                f"may have {MAX_JOINED_BYTES}."
            )
            raise InvalidInput("invalid_field", detail, "/inputs")
        inputs = [self._plan(index, each) for index, each in enumerate(command.inputs)]
        if command.tells_tokens:
            num_tokens = sum(len(target.token_ids) for each in inputs for target in each.targets)
            num_told = num_tokens * (1 + command.num_top)
            if num_told > MAX_TOLD_TOKENS:
                detail = (
                    f"{num_told} tokens would be told, alternatives included; an answer may tell "
                    f"{MAX_TOLD_TOKENS}. Lower top or send fewer inputs."
                )
                raise InvalidInput("invalid_field", detail, "/return")
        if command.tells_logits:
            _check_logits(inputs)
        return inputs

    def _plan(self, index: int, given: ScoredText | ScoredContext | ScoredIds) -> PlannedInput:
        pointer = f"/inputs/{index}"
        match given:
            case ScoredText():
                return self._plan_text(index, given.text, f"{pointer}/text")
            case ScoredContext():
                return self._plan_context(index, given, pointer)
            case ScoredIds():
                return self._plan_ids(index, given, pointer)

    def _plan_text(self, index: int, text: str, pointer: str) -> PlannedInput:
        token_ids = self._encode(text, pointer)
        if len(token_ids) < 2:
            raise InvalidInput("invalid_field", "The text has no token to score.", pointer)
        self._check_length(len(token_ids), pointer)
        positions = tuple(range(1, len(token_ids)))
        target = PlannedTarget(token_ids[1:], positions, len(text.encode()), token_ids)
        return self._whole(index, token_ids, target)

    def _plan_ids(self, index: int, given: ScoredIds, pointer: str) -> PlannedInput:
        token_ids, asked_ids = given.token_ids, given.target_ids
        self._check_vocabulary(token_ids, f"{pointer}/token_ids")
        self._check_length(len(token_ids), f"{pointer}/token_ids")
        if asked_ids is None:
            # The first token has nothing before it that could predict it.
            mask = given.mask or (False, *[True] * (len(token_ids) - 1))
            positions = tuple(place for place, is_asked in enumerate(mask) if is_asked)
            ids = tuple(token_ids[position] for position in positions)
        else:
            self._check_vocabulary(asked_ids, f"{pointer}/target_ids")
            mask = given.mask or (True,) * len(token_ids)
            places = [place for place, is_asked in enumerate(mask) if is_asked]
            positions = tuple(place + 1 for place in places)
            ids = tuple(asked_ids[place] for place in places)
        if not ids:
            raise InvalidInput("invalid_field", "No token is to be scored.", pointer)
        num_bytes = sum(len(self._codec.piece_bytes(token_id)) for token_id in ids)
        return self._whole(index, token_ids, PlannedTarget(ids, positions, num_bytes, token_ids))

    def _whole(self, index: int, token_ids: Sequence[int], target: PlannedTarget) -> PlannedInput:
        """One passage, read up to the last place behind which something is asked."""
        asked = _asked_behind(index, 0, target)
        pieces = tuple(self._pieces(token_ids[: max(asked) + 1], 0, asked))
        return PlannedInput(len(token_ids), (target,), (pieces,))

    def _plan_context(self, index: int, given: ScoredContext, pointer: str) -> PlannedInput:
        context = self._encode(given.context, f"{pointer}/context")
        self._check_length(len(context) + 1, f"{pointer}/context")
        targets = []
        # What stands before targets -> their numbers.
        followers: dict[tuple[int, ...], list[int]] = {}
        passages = []
        for number, text in enumerate(given.targets):
            place = f"{pointer}/targets/{number}"
            joined = self._encode(given.context + text, place)
            self._check_length(len(joined), place)
            before, token_ids = joined[: len(context)], joined[len(context) :]
            if not token_ids:
                detail = "The target has no token of its own behind the context."
                raise InvalidInput("invalid_field", detail, place)
            positions = tuple(range(len(context), len(joined)))
            targets.append(PlannedTarget(token_ids, positions, len(text.encode()), joined))
            if len(token_ids) - 1 > self._info.chunk_tokens:
                passages.append(self._passage(index, before, targets, [number]))
            else:
                followers.setdefault(before, []).append(number)
        for before, numbers in followers.items():
            passages.append(self._passage(index, before, targets, numbers))
        return PlannedInput(len(context), tuple(targets), tuple(passages))

    def _passage(
        self,
        index: int,
        before: tuple[int, ...],
        targets: Sequence[PlannedTarget],
        numbers: Sequence[int],
    ) -> tuple[ScorePiece, ...]:
        """A context, and then each target but its last token, which nothing needs."""
        end = len(before)
        firsts: dict[int, list[TargetToken]] = {}
        behind = {number: _asked_behind(index, number, targets[number]) for number in numbers}
        for asked in behind.values():
            firsts.setdefault(end - 1, []).extend(asked.pop(end - 1))
        pieces = [*self._pieces(before, 0, firsts)]
        for number, asked in behind.items():
            pieces += self._pieces(targets[number].token_ids[:-1], end, asked)
        return tuple(pieces)

    def _pieces(
        self, token_ids: Sequence[int], start: int, asked: Mapping[int, list[TargetToken]]
    ) -> Iterator[ScorePiece]:
        """Cut at multiples of the chunk, wherever the first token stands."""
        size, end = self._info.chunk_tokens, start + len(token_ids)
        while start < end:
            stop = min((start // size + 1) * size, end)
            own, token_ids = token_ids[: stop - start], token_ids[stop - start :]
            places = tuple(
                Asked(position - start, tuple(asked[position]))
                for position in range(start, stop)
                if position in asked
            )
            yield ScorePiece(tuple(own), start, places)
            start = stop

    def _encode(self, text: str, pointer: str) -> tuple[int, ...]:
        if self._codec.bos_id is None:
            detail = "This preset has no tokenizer; send token ids."
            raise InvalidInput("invalid_field", detail, pointer)
        return (self._codec.bos_id, *self._codec.encode(text))

    def _check_length(self, num_tokens: int, pointer: str) -> None:
        context = self._info.context_tokens
        if num_tokens > context:
            detail = f"{num_tokens} tokens exceed the context of {context} tokens."
            raise InvalidInput("context_length_exceeded", detail, pointer)

    def _check_vocabulary(self, token_ids: Sequence[int], pointer: str) -> None:
        vocab = self._info.vocabulary_size
        for place, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab:
                detail = f"A token id must be in [0, {vocab})."
                raise InvalidInput("invalid_field", detail, f"{pointer}/{place}")


def _check_logits(inputs: Sequence[PlannedInput]) -> None:
    num_places = sum(len(target.token_ids) for each in inputs for target in each.targets)
    if len(inputs) > 1 or len(inputs[0].targets) > 1 or num_places > MAX_LOGIT_PLACES:
        detail = (
            f"Logits come with one input, of one target of at most {MAX_LOGIT_PLACES} tokens; "
            f"these are {num_places}."
        )
        raise InvalidInput("invalid_field", detail, "/return")


def _asked_behind(index: int, number: int, target: PlannedTarget) -> dict[int, list[TargetToken]]:
    """Position -> the token of the target that is asked about behind it."""
    return {
        position - 1: [TargetToken(index, number, place, token_id)]
        for place, (position, token_id) in enumerate(
            zip(target.positions, target.token_ids, strict=True)
        )
    }
