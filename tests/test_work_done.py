"""Tokens for requests and tokens for padding, counted by hand."""

from service.protocol.worker_counts import WorkCounts
from service.worker.work_done import WorkDone
from tests.service_process import eventually, running_service

BUCKETS = {"decode_rows": [2, 4, 8], "prefill_tokens": [64, 128, 256]}


def test_a_chunk_is_filled_up_to_its_program():
    work = WorkDone(BUCKETS)
    for num_tokens in (1, 64, 65, 256):
        work.note_prefill(num_tokens)
    assert work.counts == WorkCounts(prefill=386, prefill_padding=63 + 0 + 63 + 0)


def test_rows_are_filled_up_in_every_step_and_eight_are_full():
    work = WorkDone(BUCKETS)
    for num_rows, num_steps in ((1, 3), (3, 1), (8, 2), (16, 1), (9, 1), (13, 1)):
        work.note_decode(num_rows, num_steps)
    # 9 are 8 and 1, which runs as 2; 13 are 8 and 5, which run as 8.
    assert work.counts == WorkCounts(decode=60, decode_padding=3 + 1 + 0 + 0 + 1 + 3)


def test_the_service_counts_what_its_worker_computed(tmp_path):
    with running_service(tmp_path) as service:
        service.generate([1, 2, 3], max_tokens=5)
        name = 'gemma_computed_tokens_total{use="request",work="%s"}'
        assert eventually(lambda: service.metric(name % "decode") >= 5)
        assert service.metric(name % "prefill") == 2
