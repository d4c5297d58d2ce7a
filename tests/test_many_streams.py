"""A thousand streams at once: none loses, repeats or mixes up a token."""

import asyncio

import psutil
import pytest

from tests.service_process import eventually, running_service
from tests.stream_clients import allow_descriptors, bodies_of, check, stream_all

NUM_STREAMS = 1000
MAX_TOKENS = 12


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--slots=64"], id="64 slots, and the rest waits"),
        pytest.param(["--engine=tests.fakes.many_slots_engine:load"], id="a slot for each"),
    ],
)
def test_a_thousand_streams_at_once_get_every_token_of_their_own_in_order(tmp_path, options):
    allow_descriptors(NUM_STREAMS + 200)
    bodies = bodies_of(NUM_STREAMS, MAX_TOKENS)
    with running_service(tmp_path, f"--queue-requests={NUM_STREAMS}", *options) as service:
        api = psutil.Process(service.process.pid)
        descriptors = api.num_fds()
        streams = asyncio.run(stream_all(service.port, bodies))
        for events, body in zip(streams, bodies, strict=True):
            check(events, body)
        # The connection that asked whether it is ready may have been idle for too long by then.
        assert eventually(lambda: api.num_fds() <= descriptors)
        tokens = 'gemma_generation_tokens_total{adapter="base"}'
        assert service.metric(tokens) == NUM_STREAMS * MAX_TOKENS
