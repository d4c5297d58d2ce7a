"""How much of what was computed was padding, worked out from what clients saw.

The service counts no padding, so this takes the shapes that `/info` lists and applies them to each
chunk of a prompt, and to each token with as many rows beside it as streams were running.
"""

from collections.abc import Sequence

from bench.streams import Record

# Tokens of one step reach their clients within this time.
_SAME_STEP_SECONDS = 0.01


def shape_for(count: int, shapes: Sequence[int]) -> int:
    """What is computed for ``count`` rows or tokens: full ones of the largest shape, and a rest."""
    full, rest = divmod(count, shapes[-1])
    return full * shapes[-1] + (next(shape for shape in shapes if shape >= rest) if rest else 0)


def prefill_padding(records: Sequence[Record], shapes: Sequence[int]) -> float:
    """Share of the computed positions of prompts that were padding.

    The last token of a prompt is decoded, and cached ones are not computed.
    """
    lengths = [
        record.num_prompt_tokens - 1 - record.cached_tokens for record in records if record.arrivals
    ]
    computed = sum(shape_for(length, shapes) for length in lengths)
    return 1 - sum(lengths) / computed if computed else 0.0


def decode_padding(records: Sequence[Record], shapes: Sequence[int]) -> float:
    """Share of the computed rows of decode steps that were padding."""
    spans = [(r.arrivals[0][0], r.arrivals[-1][0]) for r in records if r.arrivals]
    tokens = rows = 0.0
    for record in records:
        for time, count in record.arrivals:
            running = sum(
                first - _SAME_STEP_SECONDS <= time <= last + _SAME_STEP_SECONDS
                for first, last in spans
            )
            tokens += count
            rows += count * shape_for(running, shapes) / running
    return 1 - tokens / rows if rows else 0.0
