"""What a worker counts from its start on, as its heartbeats tell it."""

import msgspec


class WorkCounts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tokens computed since the worker started, and those that only filled up a shape."""

    prefill: int = 0
    prefill_padding: int = 0
    decode: int = 0
    decode_padding: int = 0
    score: int = 0
    score_padding: int = 0
    train: int = 0
    train_padding: int = 0


class AdapterCounts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Adapters in the bank; how many were written into it, and put out, since the start."""

    num_resident: int = 0
    num_loads: int = 0
    num_evictions: int = 0
