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
from service.worker.interventions import (
    MAX_CAPTURE_BYTES,
    MAX_TENSOR_BYTES,
    InvalidPlace,
    TextPlaces,
    check_interventions,
    check_layers,
    places_between,
    places_of,
)
from service.worker.score_line import Asked, Marked, ScorePiece, TargetToken

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
    """Token ids of a target, their positions in its text, and all ids of that.

    ``touched`` has the positions of the text at which each intervention acts.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    num_bytes: int
    text_ids: tuple[int, ...]
    touched: tuple[range | tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class PlannedCapture:
    """What one capture of the request takes of the text of one target: these positions."""

    target_index: int
    number: int
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlannedInput:
    """One input: its targets, and the pieces of every passage that is read for them.

    ``captures`` are in the order of their targets and then of the request.
    """

    num_prompt_tokens: int
    targets: tuple[PlannedTarget, ...]
    passages: tuple[tuple[ScorePiece, ...], ...]
    captures: tuple[PlannedCapture, ...] = ()


@dataclass(frozen=True, slots=True)
class _Text:
    """The text of one target: where interventions act in it, and what is captured of it."""

    key: tuple[int, int]
    touched: tuple[range | tuple[int, ...], ...]
    captured: tuple[range | tuple[int, ...], ...]

    @property
    def num_captured_tokens(self) -> int:
        """So many first tokens must be read for what is captured."""
        return max((places[-1] + 1 for places in self.captured if places), default=0)

    def planned(self) -> list[PlannedCapture]:
        return [
            PlannedCapture(self.key[1], number, tuple(places))
            for number, places in enumerate(self.captured)
        ]


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
        try:
            check_interventions(command.interventions, self._info)
            for number, capture in enumerate(command.captures):
                check_layers(capture.layers, self._info, f"/capture/{number}")
            inputs = [self._plan(command, index) for index in range(len(command.inputs))]
        except InvalidPlace as error:
            raise InvalidInput("invalid_field", error.detail, error.pointer) from None
        if command.tells_tokens:
            num_tokens = sum(len(target.token_ids) for each in inputs for target in each.targets)
            num_told = num_tokens * (1 + command.num_top) * len(command.versions)
            if num_told > MAX_TOLD_TOKENS:
                detail = (
                    f"{num_told} tokens would be told, alternatives included; an answer may tell "
                    f"{MAX_TOLD_TOKENS}. Lower top or send fewer inputs."
                )
                raise InvalidInput("invalid_field", detail, "/return")
        if command.tells_logits:
            _check_logits(inputs, len(command.versions))
        self._check_captures(command, inputs)
        return inputs

    def _check_captures(self, command: Score, inputs: Sequence[PlannedInput]) -> None:
        num_bytes = 0
        for each in (each for given in inputs for each in given.captures):
            capture = command.captures[each.number]
            size = self._info.hidden_dim * (2 if capture.is_half else 4)
            num_bytes += len(each.positions) * len(capture.layers) * size * len(command.versions)
        if num_bytes > MAX_CAPTURE_BYTES:
            detail = (
                f"{num_bytes} bytes would be captured; an answer may have {MAX_CAPTURE_BYTES}. "
                "Name fewer layers or positions."
            )
            raise InvalidInput("invalid_field", detail, "/capture")
        if not (num_bytes and command.tells_logits):
            return
        [[target]] = [given.targets for given in inputs]
        num_logits = len(target.token_ids) * self._info.vocabulary_size
        num_bytes += 4 * num_logits * len(command.versions)
        if num_bytes > MAX_TENSOR_BYTES:
            detail = (
                f"Logits and what is captured would have {num_bytes} bytes; an answer may have "
                f"{MAX_TENSOR_BYTES}."
            )
            raise InvalidInput("invalid_field", detail, "/capture")

    def _text(self, command: Score, index: int, number: int, places: TextPlaces) -> _Text:
        """Raises `InvalidPlace` for a position that is not in it."""
        return _Text(
            (index, number),
            tuple(
                places_of(each.positions, places, f"/interventions/{place}")
                for place, each in enumerate(command.interventions)
            ),
            tuple(
                places_of(each.positions, places, f"/capture/{place}")
                for place, each in enumerate(command.captures)
            ),
        )

    def _plan(self, command: Score, index: int) -> PlannedInput:
        pointer = f"/inputs/{index}"
        match command.inputs[index]:
            case ScoredText(text=text):
                return self._plan_text(command, index, text, f"{pointer}/text")
            case ScoredContext() as given:
                return self._plan_context(command, index, given, pointer)
            case ScoredIds() as given:
                return self._plan_ids(command, index, given, pointer)

    def _plan_text(self, command: Score, index: int, text: str, pointer: str) -> PlannedInput:
        token_ids = self._encode(text, pointer)
        if len(token_ids) < 2:
            raise InvalidInput("invalid_field", "The text has no token to score.", pointer)
        self._check_length(len(token_ids), pointer)
        positions = tuple(range(1, len(token_ids)))
        places = TextPlaces(len(token_ids), range(1, len(token_ids)))
        whole = self._text(command, index, 0, places)
        num_bytes = len(text.encode())
        target = PlannedTarget(token_ids[1:], positions, num_bytes, token_ids, whole.touched)
        return self._whole(token_ids, target, whole)

    def _plan_ids(self, command: Score, index: int, given: ScoredIds, pointer: str) -> PlannedInput:
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
        masked = tuple(place for place, is_asked in enumerate(mask) if is_asked)
        text = self._text(command, index, 0, TextPlaces(len(token_ids), masked))
        target = PlannedTarget(ids, positions, num_bytes, token_ids, text.touched)
        return self._whole(token_ids, target, text)

    def _whole(self, token_ids: Sequence[int], target: PlannedTarget, text: _Text) -> PlannedInput:
        """One passage, read up to the last place about which something is to be known."""
        asked = _asked_behind(text.key[0], 0, target)
        end = max(max(asked) + 1, text.num_captured_tokens)
        pieces = tuple(self._pieces(token_ids[:end], 0, asked, [text]))
        return PlannedInput(len(token_ids), (target,), (pieces,), tuple(text.planned()))

    def _plan_context(
        self, command: Score, index: int, given: ScoredContext, pointer: str
    ) -> PlannedInput:
        context = self._encode(given.context, f"{pointer}/context")
        self._check_length(len(context) + 1, f"{pointer}/context")
        targets = []
        # What stands before targets -> their numbers.
        followers: dict[tuple[int, ...], list[int]] = {}
        passages = []
        texts = []
        for number, text in enumerate(given.targets):
            place = f"{pointer}/targets/{number}"
            joined = self._encode(given.context + text, place)
            self._check_length(len(joined), place)
            before, token_ids = joined[: len(context)], joined[len(context) :]
            if not token_ids:
                detail = "The target has no token of its own behind the context."
                raise InvalidInput("invalid_field", detail, place)
            positions = tuple(range(len(context), len(joined)))
            texts.append(
                self._text(
                    command,
                    index,
                    number,
                    TextPlaces(len(joined), range(len(context), len(joined))),
                )
            )
            touched = texts[-1].touched
            targets.append(PlannedTarget(token_ids, positions, len(text.encode()), joined, touched))
            num_read = max(len(token_ids) - 1, texts[-1].num_captured_tokens - len(before))
            if num_read > self._info.chunk_tokens:
                passages.append(self._passage(before, targets, texts, [number]))
            else:
                followers.setdefault(before, []).append(number)
        for before, numbers in followers.items():
            passages.append(self._passage(before, targets, texts, numbers))
        captures = tuple(each for text in texts for each in text.planned())
        return PlannedInput(len(context), tuple(targets), tuple(passages), captures)

    def _passage(
        self,
        before: tuple[int, ...],
        targets: Sequence[PlannedTarget],
        texts: Sequence[_Text],
        numbers: Sequence[int],
    ) -> tuple[ScorePiece, ...]:
        """A context, and then each target but its last token, unless that is captured."""
        end = len(before)
        firsts: dict[int, list[TargetToken]] = {}
        behind = {number: _asked_behind(*texts[number].key, targets[number]) for number in numbers}
        for asked in behind.values():
            firsts.setdefault(end - 1, []).extend(asked.pop(end - 1))
        # Interventions act in the same places of the context, whichever target follows.
        pieces = [*self._pieces(before, 0, firsts, [texts[number] for number in numbers])]
        for number, asked in behind.items():
            token_ids, text = targets[number].token_ids, texts[number]
            num_read = max(len(token_ids) - 1, text.num_captured_tokens - end)
            pieces += self._pieces(token_ids[:num_read], end, asked, [text])
        return tuple(pieces)

    def _pieces(
        self,
        token_ids: Sequence[int],
        start: int,
        asked: Mapping[int, list[TargetToken]],
        texts: Sequence[_Text],
    ) -> Iterator[ScorePiece]:
        """Cut at multiples of the chunk, wherever the first token stands.

        All of ``texts`` have these tokens there.
        """
        size, end = self._info.chunk_tokens, start + len(token_ids)
        while start < end:
            stop = min((start // size + 1) * size, end)
            own, token_ids = token_ids[: stop - start], token_ids[stop - start :]
            places = tuple(
                Asked(position - start, tuple(asked[position]))
                for position in range(start, stop)
                if position in asked
            )
            touched = _marked(texts[0].touched, start, stop, ())
            captured = _marked(texts[0].captured, start, stop, tuple(each.key for each in texts))
            yield ScorePiece(tuple(own), start, places, touched, captured)
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


def _marked(
    places: Sequence[range | tuple[int, ...]],
    start: int,
    stop: int,
    targets: tuple[tuple[int, int], ...],
) -> tuple[Marked, ...]:
    """What of several parts of a request is between two positions."""
    inside = [(number, places_between(each, start, stop)) for number, each in enumerate(places)]
    return tuple(Marked(number, each, targets) for number, each in inside if each)


def _check_logits(inputs: Sequence[PlannedInput], num_versions: int) -> None:
    num_tokens = sum(len(target.token_ids) for each in inputs for target in each.targets)
    num_places = num_tokens * num_versions
    if len(inputs) > 1 or len(inputs[0].targets) > 1 or num_places > MAX_LOGIT_PLACES:
        detail = (
            f"Logits come with one input, of one target of at most {MAX_LOGIT_PLACES} tokens, "
            f"once for each model; these are {num_places}."
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
