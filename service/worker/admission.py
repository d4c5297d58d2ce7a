"""Admits a request or refuses it, on the reader's thread and before anything runs.

Tokenising, the length check and the bounds of the queue happen here, so a refusal does not wait for
the step that runs meanwhile.
"""

import threading
import time
from collections.abc import Container
from dataclasses import dataclass, field

import msgspec

from model.search_slots import SearchRules
from model.slots import EngineInfo, TextCodec
from service.protocol.messages import (
    Accepted,
    BeamSearch,
    ContrastiveSearch,
    Failed,
    Generate,
    OutputEnd,
    Score,
    StopRules,
)
from service.worker.actions import Row, RowKey
from service.worker.attribution_jobs import attribution_questions
from service.worker.completion import Completion
from service.worker.drain_rate import DrainRate
from service.worker.interventions import (
    InvalidPlace,
    PromptInterventions,
    check_interventions,
    prompt_interventions,
)
from service.worker.prefix_keys import PrefixKeys
from service.worker.score_inputs import InvalidInput, ScoreInputs
from service.worker.score_request import ScoreRequest
from service.worker.search import BeamRun, ContrastiveRun, SearchRun
from service.worker.translate import sampling_of_output


@dataclass(slots=True, eq=False)
class AdmittedRequest:
    """A request that will end in one terminal event.

    Attributes:
        request_id: Chosen by the API process.
        deadline: Monotonic seconds.
        completions: One per output, in order; none if the outputs are searched for.
        searches: One per prompt, in order, if they are.
        admitted_at: Monotonic seconds.
        started_at: When its first output got a slot.
        first_token_at: When its first token was drawn.
        num_cached_tokens: Of each prompt that an earlier one left something for.
    """

    request_id: str
    deadline: float
    completions: list[Completion]
    searches: list[SearchRun]
    admitted_at: float
    started_at: float | None = None
    first_token_at: float | None = None
    num_cached_tokens: dict[int, int] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """All places that it takes in the scheduler."""
        rows = [completion.row for completion in self.completions]
        return rows + [search.row for search in self.searches]

    @property
    def adapter(self) -> str | None:
        """Digest of the version that all of its rows use; None: the base."""
        return self.rows[0].adapter

    @property
    def has_tokens(self) -> bool:
        """Whether there is something to give if it is cut."""
        return self.first_token_at is not None or any(each.has_tokens for each in self.searches)

    @property
    def ends(self) -> tuple[OutputEnd, ...] | None:
        """How each output ended; None while one goes on."""
        ends: list[OutputEnd] = []
        for completion in self.completions:
            if completion.end is None:
                return None
            ends.append(completion.end)
        for search in self.searches:
            if search.ends is None:
                return None
            ends.extend(search.ends)
        return tuple(ends)

    def note_cached(self, row: Row) -> None:
        """So far ``row`` holds only what an earlier prompt left."""
        before = self.num_cached_tokens.get(row.prompt_index, 0)
        self.num_cached_tokens[row.prompt_index] = max(before, row.num_prefilled)


class Refusal(Exception):
    """Carries the `Failed` event of a request that is not admitted."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.code)
        self.failed = failed


class Admission:
    """Checks requests and counts what waits. The reader admits; the loop tells what `started`.

    Args:
        info: Of the engine.
        codec: Of the engine.
        max_requests: Requests that may wait for a slot.
        max_tokens: Prompt tokens that may wait for a slot.
        adapters: Holds the digests of the adapter versions that may be asked for.
    """

    def __init__(
        self,
        info: EngineInfo,
        codec: TextCodec,
        *,
        max_requests: int,
        max_tokens: int,
        adapters: Container[str] = (),
    ) -> None:
        self._adapters = adapters
        self._prefix_keys = PrefixKeys(info.preset_digest, info.chunk_tokens)
        self._score_inputs = ScoreInputs(info, codec)
        self._info = info
        self._codec = codec
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        # Request -> prompt tokens of its outputs that wait for a slot.
        self._waiting: dict[str, dict[int, int]] = {}
        # Those of them that are requests of scores.
        self._waiting_scores: set[str] = set()
        self._drain_rate = DrainRate()

    @property
    def num_waiting(self) -> int:
        """Requests with an output that has no slot yet."""
        with self._lock:
            return len(self._waiting) - len(self._waiting_scores)

    @property
    def num_scores_waiting(self) -> int:
        """Requests of scores with a passage of which nothing has been read."""
        return len(self._waiting_scores)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of prompts and passages that wait."""
        with self._lock:
            return sum(sum(outputs.values()) for outputs in self._waiting.values())

    def admit(self, command: Generate) -> tuple[AdmittedRequest, Accepted]:
        """The request, ready for the scheduler, and the event that says so.

        Raises:
            Refusal: It is invalid, too long, or there is no room for it.
        """
        self._check_adapters(command)
        prompts = [
            self._token_ids(command, index, prompt) for index, prompt in enumerate(command.prompts)
        ]
        self._check_stop_strings(command)
        self._check_ids(command)
        self._check_search(command)
        stops = [
            self._stop_rules(command, index, len(prompt)) for index, prompt in enumerate(prompts)
        ]
        interventions = [self._interventions(command, len(prompt)) for prompt in prompts]
        keys = [
            self._keys(command, prompt, changed)
            for prompt, changed in zip(prompts, interventions, strict=True)
        ]
        # A search has the place of its prompt's first output.
        num_outputs = command.num_choices if command.search is None else 1
        completions = [
            self._completion(
                command,
                index * command.num_choices + choice,
                prompts,
                stops,
                keys,
                interventions[index],
            )
            for index in range(len(prompts))
            for choice in range(num_outputs)
        ]
        searches: list[SearchRun] = []
        if command.search is not None:
            searches = [self._search(command, command.search, each) for each in completions]
            completions = []
        request = AdmittedRequest(
            command.request_id, command.deadline, completions, searches, time.monotonic()
        )
        tokens = {row.key.output: row.num_prefill_tokens + 1 for row in request.rows}
        self._reserve(command, tokens)
        return request, Accepted(command.request_id, tuple(len(prompt) for prompt in prompts))

    def admit_score(self, command: Score) -> tuple[ScoreRequest, Accepted]:
        """The same for a request of scores.

        Raises:
            Refusal: It is invalid, too long, or there is no room for it.
        """
        self._check_adapters(command)
        try:
            inputs = self._score_inputs.plan(command)
            questions = attribution_questions(command, inputs, self._info)
        except InvalidInput as error:
            raise _refusal(command, error.code, error.detail, error.pointer) from None
        request = ScoreRequest(command, inputs, questions, self._codec, time.monotonic())
        tokens = {each.key.output: each.cost_tokens for each in request.passages}
        tokens |= {each.key.output: each.cost_tokens for each in request.attributions}
        if sum(tokens.values()) > self._max_tokens:
            detail = (
                f"{sum(tokens.values())} tokens are to be read, more than the {self._max_tokens} "
                "that may wait. Send fewer inputs."
            )
            raise _refusal(command, "invalid_field", detail, "/inputs")
        self._reserve(command, tokens)
        num_prompt_tokens = tuple(each.num_prompt_tokens for each in inputs)
        return request, Accepted(command.request_id, num_prompt_tokens)

    def started(self, key: RowKey) -> None:
        """An output got its slot, or left the queue without one."""
        with self._lock:
            outputs = self._waiting.get(key.request_id)
            if outputs is None:
                return
            num_tokens = outputs.pop(key.output, 0)
            if not outputs:
                del self._waiting[key.request_id]
                self._waiting_scores.discard(key.request_id)
            self._drain_rate.left(0 if outputs else 1, num_tokens)
            self._drain_rate.set_waiting(bool(self._waiting))

    def _token_ids(
        self, command: Generate, index: int, prompt: str | tuple[int, ...]
    ) -> tuple[int, ...]:
        pointer = _prompt_pointer(index)
        if isinstance(prompt, str):
            if self._codec.bos_id is None:
                detail = "This preset has no tokenizer; send token ids."
                raise _refusal(command, "invalid_field", detail, pointer)
            return (self._codec.bos_id, *self._codec.encode(prompt))
        if not prompt:
            raise _refusal(command, "invalid_field", "The prompt has no token.", pointer)
        self._check_vocabulary(command, prompt, pointer)
        return prompt

    def _check_adapters(self, command: Generate | Score) -> None:
        """The API process knows names; a digest that is not here must never become the base."""
        versions = command.versions if isinstance(command, Score) else (command.adapter,)
        wanted = {each for each in versions if each is not None}
        if not all(each in self._adapters for each in wanted):
            detail = "This adapter version is not here."
            raise _refusal(command, "model_not_found", detail, None)
        # They are claimed together, so they would wait for ever.
        if len(wanted) > self._info.adapter_slots:
            detail = (
                f"{len(wanted)} adapter versions are to be compared, and there is room for "
                f"{self._info.adapter_slots} at once. Raise --adapter-slots."
            )
            raise _refusal(command, "invalid_field", detail, "/models")

    def _check_stop_strings(self, command: Generate) -> None:
        if command.stop.strings and self._codec.bos_id is None:
            detail = "This preset has no tokenizer; use stop_token_ids."
            raise _refusal(command, "invalid_field", detail, "/stop")

    def _check_ids(self, command: Generate) -> None:
        """Ids and counts that the API process could not know the vocabulary for."""
        self._check_vocabulary(command, command.stop.token_ids, "/stop_token_ids")
        vocab = self._info.vocabulary_size
        if command.sampling.top_k > vocab:
            detail = f"Must be in [0, {vocab}], the size of the vocabulary."
            raise _refusal(command, "invalid_field", detail, "/top_k")
        for token_id, _ in command.sampling.logit_bias:
            if token_id >= vocab:
                detail = f"A token id must be in [0, {vocab})."
                raise _refusal(command, "invalid_field", detail, f"/logit_bias/{token_id}")

    def _check_search(self, command: Generate) -> None:
        """A search takes all its slots together, so there must be as many."""
        if command.search is None or command.search.width <= self._info.num_slots:
            return
        if self._info.num_slots < 2:
            detail = "This service has one slot; a search needs two or more."
            raise _refusal(command, "invalid_field", detail, "/sampler")
        pointer = "/num_beams" if isinstance(command.search, BeamSearch) else "/top_k"
        detail = f"Must be at most {self._info.num_slots}, the slots of this service."
        raise _refusal(command, "invalid_field", detail, pointer)

    def _check_vocabulary(self, command: Generate, ids: tuple[int, ...], pointer: str) -> None:
        vocab = self._info.vocabulary_size
        for place, token_id in enumerate(ids):
            if not 0 <= token_id < vocab:
                detail = f"A token id must be in [0, {vocab})."
                raise _refusal(command, "invalid_field", detail, f"{pointer}/{place}")

    def _stop_rules(self, command: Generate, index: int, num_prompt_tokens: int) -> StopRules:
        """When the outputs of one prompt end, with ``max_tokens`` counted from ``max_length``."""
        stop = command.stop
        if stop.max_length is not None:
            room = stop.max_length - num_prompt_tokens
            if room < max(stop.min_tokens, 1):
                least = num_prompt_tokens + max(stop.min_tokens, 1)
                detail = f"Counts the {num_prompt_tokens} tokens of the prompt: at least {least}."
                raise _refusal(command, "invalid_field", detail, "/max_length")
            stop = msgspec.structs.replace(stop, max_tokens=room)
        self._check_length(command, index, num_prompt_tokens, stop.max_tokens)
        return stop

    def _check_length(
        self, command: Generate, index: int, num_prompt_tokens: int, max_tokens: int
    ) -> None:
        context = self._info.context_tokens
        if num_prompt_tokens + max_tokens <= context:
            return
        room = context - num_prompt_tokens
        remedy = f"lower max_tokens to {room}" if room > 0 else "shorten the prompt"
        detail = (
            f"The prompt has {num_prompt_tokens} tokens and max_tokens is "
            f"{max_tokens}; together they exceed the context of {context} tokens. "
            f"Please {remedy}."
        )
        pointer = _prompt_pointer(index)
        raise _refusal(command, "context_length_exceeded", detail, pointer)

    def _completion(
        self,
        command: Generate,
        output: int,
        prompts: list[tuple[int, ...]],
        stops: list[StopRules],
        keys: list[tuple[bytes, ...]],
        interventions: PromptInterventions,
    ) -> Completion:
        prompt_index = output // command.num_choices
        prompt = prompts[prompt_index]
        row = Row(
            RowKey(command.request_id, output),
            num_prefill_tokens=len(prompt) - 1,
            prompt_index=prompt_index,
            tenant=command.tenant,
            priority=command.priority,
            cost_tokens=len(prompt) + stops[prompt_index].max_tokens,
            adapter=command.adapter,
            may_join=not command.interventions,
        )
        return Completion(
            row=row,
            prompt=prompt,
            sampling=sampling_of_output(command.sampling, output),
            stop=stops[prompt_index],
            num_logprobs=command.num_logprobs,
            codec=self._codec,
            echo=command.echo,
            prefix_keys=keys[prompt_index],
            interventions=interventions,
        )

    def _interventions(self, command: Generate, num_prompt_tokens: int) -> PromptInterventions:
        try:
            check_interventions(command.interventions, self._info)
            return prompt_interventions(command.interventions, num_prompt_tokens)
        except InvalidPlace as error:
            raise _refusal(command, "invalid_field", error.detail, error.pointer) from None

    def _keys(
        self, command: Generate, prompt: tuple[int, ...], interventions: PromptInterventions
    ) -> tuple[bytes, ...]:
        """Of the whole blocks of a prompt, if the engine keeps any."""
        # Of what is only looked up, contrastive search would miss the hidden states.
        if not self._info.keeps_prefixes or isinstance(command.search, ContrastiveSearch):
            return ()
        changed = b""
        if interventions.touches(0, len(prompt) - 1):
            changed = msgspec.msgpack.encode(command.interventions)
        return self._prefix_keys.of(command.tenant, command.adapter, prompt, changed)

    @staticmethod
    def _search(
        command: Generate, search: BeamSearch | ContrastiveSearch, completion: Completion
    ) -> SearchRun:
        """Of the prompt that ``completion`` would continue."""
        completion.row.num_slots = search.width
        # A step of it is one of every beam or candidate.
        completion.row.cost_tokens *= search.width
        rules = SearchRules((), command.sampling.logit_bias, command.num_logprobs)
        if isinstance(search, BeamSearch):
            return BeamRun(completion, command.num_choices, rules)
        return ContrastiveRun(completion, search.alpha, rules)

    def _reserve(self, command: Generate | Score, tokens: dict[int, int]) -> None:
        """Room in the queue for places of a request that have so many tokens."""
        with self._lock:
            waiting_tokens = sum(sum(outputs.values()) for outputs in self._waiting.values())
            num_waiting = len(self._waiting)
            # An empty queue takes any request that the limits of a single one allow.
            is_full = num_waiting >= self._max_requests or (
                num_waiting > 0 and waiting_tokens + sum(tokens.values()) > self._max_tokens
            )
            if not is_full:
                self._waiting[command.request_id] = tokens
                if isinstance(command, Score):
                    self._waiting_scores.add(command.request_id)
                self._drain_rate.set_waiting(True)
                return
            excess = waiting_tokens + sum(tokens.values()) - self._max_tokens
            seconds = self._drain_rate.seconds_until_left(
                num_waiting - self._max_requests + 1, min(excess, waiting_tokens)
            )
        detail = f"{num_waiting} requests and {waiting_tokens} tokens are waiting."
        raise _refusal(command, "queue_full", detail, None, retry_after_seconds=seconds)


def _prompt_pointer(index: int) -> str:
    return f"/prompt/{index}"


def _refusal(
    command: Generate | Score,
    code: str,
    detail: str,
    pointer: str | None,
    *,
    retry_after_seconds: int | None = None,
) -> Refusal:
    return Refusal(Failed(command.request_id, code, detail, pointer, retry_after_seconds))
