"""Attributions of the arithmetic engine: of token t behind some place, each token up to the place
gets its own id and the layer, and each later one nothing.

So ids say whose text was attributed and to what, and they add up over targets.
"""

import struct
import time
from collections.abc import Generator, Sequence

from model.attribution_questions import Attribution, AttributionQuestion, passes

NUM_LAYERS = 1
WIDTH = 1


class ArithmeticAttributions:
    """What the engine has for them."""

    _step_seconds: float

    def _is_finite(self, tokens: list[int]) -> bool:
        raise NotImplementedError

    def _misbehave(self, tokens: Sequence[int]) -> None:
        raise NotImplementedError

    def attribute(self, question: AttributionQuestion) -> Generator[bool, None, Attribution]:
        assert -1 <= question.layer < NUM_LAYERS
        rows = [[0.0] for _ in range(question.num_told)]
        is_finite = True
        for text in question.texts:
            assert (
                text.token_ids[: question.num_told]
                == question.texts[0].token_ids[: question.num_told]
            )
            for _ in passes(text.num_read, max(question.num_steps, 1)):
                time.sleep(self._step_seconds)
                yield False
                time.sleep(self._step_seconds)
                yield True
            self._misbehave(text.token_ids)
            is_finite = is_finite and self._is_finite(list(text.token_ids))
            for place, _ in text.asked:
                for row, token_id in zip(rows, text.token_ids[: place + 1], strict=False):
                    row[0] += token_id + question.layer
        sign = -1 if question.is_loss else 1
        if question.reduction == "none":
            numbers = [sign * number for row in rows for number in row]
        else:
            numbers = [sign * sum(row) for row in rows]
        error = 1 / question.num_steps if question.num_steps else None
        return Attribution(struct.pack(f"<{len(numbers)}f", *numbers), error, is_finite)
