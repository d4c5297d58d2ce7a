"""Searches of the arithmetic engine, as integers and eighths.

After some tokens whose sum goes to s, the likely tokens are s, s + 1 … s + 7, and token t of place
j has the log-probability −(1 + j + (t modulo 7) / 8). Eighths add up exactly, so a beam search can
be checked by trying every continuation.

A contrastive search with alpha 0 chooses the first candidate, and with any other the one whose
place is the position modulo their number.
"""

import time
from collections.abc import Sequence

from model.search_slots import MAX_WIDTH, Beam, BeamStep, CandidateStep, Choice, Extension
from model.slots import SampledToken
from tests.fakes.arithmetic_stream import embedded, stream

VOCABULARY_SIZE = 1000


def likely_tokens(tokens: Sequence[int], banned_ids: Sequence[int] = ()) -> list[tuple[int, float]]:
    """Ids and log-probabilities after some tokens, likeliest first."""
    first = sum(tokens) % VOCABULARY_SIZE
    ids = [(first + place) % VOCABULARY_SIZE for place in range(MAX_WIDTH + len(banned_ids))]
    allowed = [id_ for id_ in ids if id_ not in banned_ids][:MAX_WIDTH]
    found = [(id_, -(1 + place + id_ % 7 / 8)) for place, id_ in enumerate(allowed)]
    return sorted(found, key=lambda pair: -pair[1])


def chosen_place(position: int, num_candidates: int, alpha: float) -> int:
    """Of the winner of a contrastive step."""
    return 0 if alpha == 0 else position % num_candidates


class ArithmeticSearches:
    """What the engine has for them, beside its slots."""

    _slots: list[list[int]]
    _step_seconds: float
    # What each adapter adds to a sum.
    _adapters: list[int]
    hidden_slots: set[int]

    def keep_hidden(self, slot: int) -> None:
        assert slot not in self.hidden_slots, "kept twice"
        self.hidden_slots.add(slot)

    def drop_hidden(self, slot: int) -> None:
        self.hidden_slots.discard(slot)

    def step_beams(self, step: BeamStep) -> list[Extension]:
        assert 2 <= len(step.slots) <= MAX_WIDTH
        assert len(step.beams) in (1, len(step.slots))
        assert any(not beam.is_done for beam in step.beams)
        time.sleep(self._step_seconds)
        found: list[tuple[float, int, SampledToken | None]] = []
        for source, beam in enumerate(step.beams):
            if beam.is_done:
                found.append((beam.logprob, source, None))
                continue
            newest = embedded(beam.token_id, step.rules.interventions)
            tokens = self._write(beam.slot, step.position, newest)
            if not self._is_finite(tokens):
                return []
            tokens = [stream(tokens, step.rules.interventions), self._adapters[step.adapter]]
            likely = likely_tokens(tokens, step.rules.banned_ids)
            found += [
                (beam.logprob + logprob, source, _sampled(id_, logprob, tokens, step))
                for id_, logprob in likely
            ]
        found.sort(key=lambda each: -each[0])
        best = found[: len(step.slots)]
        held = [list(self._slots[step.beams[source].slot]) for _, source, _ in best]
        extensions = []
        # In another order than the slots have: who asks must look where its beams went.
        for slot, tokens, (logprob, source, token) in zip(
            reversed(step.slots), held, best, strict=True
        ):
            self._slots[slot] = tokens
            before = step.beams[source]
            token_id = before.token_id if token is None else token.token_id
            beam = Beam(slot, token_id, logprob, is_done=before.is_done)
            extensions.append(Extension(source, beam, token))
        return extensions

    def step_candidates(self, step: CandidateStep) -> Choice | None:
        assert 2 <= len(step.slots) <= MAX_WIDTH
        assert len(step.token_ids) == len(step.probabilities) == len(step.slots)
        assert step.slots[0] in self.hidden_slots, "hidden states were not kept"
        time.sleep(self._step_seconds)
        written = [
            self._write(slot, step.position, embedded(token_id, step.rules.interventions))
            for slot, token_id in zip(step.slots, step.token_ids, strict=True)
        ]
        assert len({tuple(tokens[:-1]) for tokens in written}) == 1, "slots with different pasts"
        if not all(self._is_finite(tokens) for tokens in written):
            return None
        place = chosen_place(step.position, len(step.slots), step.alpha)
        for slot in step.slots:
            self._slots[slot] = list(written[place])
        changed = stream(written[place], step.rules.interventions)
        chosen = [changed, self._adapters[step.adapter]]
        likely = likely_tokens(chosen, step.rules.banned_ids)[: len(step.slots)]
        candidates = [_sampled(id_, logprob, chosen, step) for id_, logprob in likely]
        probabilities = tuple(1 / (place + 2) for place in range(len(candidates)))
        return Choice(place, tuple(candidates), probabilities)

    def _write(self, slot: int, position: int, token_id: int) -> list[int]:
        raise NotImplementedError

    def _is_finite(self, tokens: list[int]) -> bool:
        raise NotImplementedError


def _sampled(
    token_id: int, logprob: float, tokens: Sequence[int], step: BeamStep | CandidateStep
) -> SampledToken:
    if step.rules.num_logprobs is None:
        return SampledToken(token_id)
    return SampledToken(token_id, logprob, tuple(likely_tokens(tokens)[: step.rules.num_logprobs]))
