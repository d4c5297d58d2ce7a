"""A full queue refuses at once, however long the step is that runs meanwhile."""

import contextlib

from tests.service_process import eventually, running_service

RUNNING = 'gemma_num_requests_running{op="generate"}'
TOKENS = 'gemma_generation_tokens_total{adapter="base"}'


def test_f_r10_twenty_refusals_come_back_while_one_step_runs(tmp_path):
    options = ("--slots=1", "--queue-requests=1")
    # A step takes longer than this test: it is stopped in the middle of the first one.
    with (
        running_service(tmp_path, *options, ARITHMETIC_STEP_SECONDS="60") as service,
        contextlib.ExitStack() as stack,
    ):
        for prompt in ([1], [2]):
            stream = stack.enter_context(service.stream(prompt))
            assert next(stream)["event"] == "start"
            # The first one must have left the queue before the second one comes.
            assert eventually(lambda: service.metric(RUNNING) == 1)
        for _ in range(20):
            refusal = service.generate([3, 4])
            assert (refusal.status_code, refusal.json()["code"]) == (429, "queue_full")
            assert refusal.json()["detail"] == "1 requests and 1 tokens are waiting."
            promise = int(refusal.headers["retry-after"])
            assert 1 <= promise == refusal.json()["retry_after_s"] <= 600
        assert service.metric(TOKENS) == 0
