"""A first call of a program costs tens of milliseconds, which no request pays if it is made before.

What these calls write into slots is never seen, as whatever a slot holds at its start.
"""

import numpy as np

from model.score_slots import AskedPlace, ScoreEngine
from model.slots import DecodeRow, PromptChunk, RowRules, Sampling


def call_slot_programs(engine: ScoreEngine) -> None:
    """Runs every program that prefills, copies, decodes, joins or measures."""
    info = engine.info
    engine.begin(0, [0])
    for bucket in info.buckets["prefill_tokens"]:
        token_ids = [0] * min(bucket, info.context_tokens)
        for _ in engine.prefill([PromptChunk(0, token_ids, 0)]):
            pass
    engine.copy(0, [0], 1)
    rules = _rules(info.context_tokens)
    for bucket in info.buckets["decode_rows"]:
        engine.decode(_rows(min(bucket, info.num_slots), rules), 1).tokens()
    if info.joined_tokens:
        # In a slot of a score: beside a single slot there may be no other.
        prompt = PromptChunk(info.num_slots, [0], 0)
        rows = _rows(min(info.num_slots, info.joined_rows), rules)
        engine.join([prompt], rows).tokens()
    residual = np.zeros(info.hidden_dim, np.float32)
    engine.measure([AskedPlace(residual, (0,), num_top=1)])


def _rules(context_tokens: int) -> RowRules:
    """Rules that leave nothing out."""
    return RowRules(
        Sampling(
            temperature=1.0,
            top_k=1,
            top_p=0.5,
            seed=0,
            min_p=0.1,
            repetition_penalty=1.1,
            logit_bias=((0, 1.0),),
        ),
        num_prompt=1,
        end=context_tokens,
        stop_ids=(0,),
        may_stop_at=1,
        num_logprobs=1,
    )


def _rows(count: int, rules: RowRules) -> list[DecodeRow]:
    return [DecodeRow(slot, 0, rules) for slot in range(count)]
