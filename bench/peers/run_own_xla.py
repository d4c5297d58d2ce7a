"""This service itself without its native kernels: ``run_own_xla.py PRESET``; see `answering`.

Not another implementation, but the portable path beside the native one, over HTTP as ours is.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from answering import serve

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.service_process import running_service
from bench.streams import Ask, together

_SLOTS = "16"


def main(preset):
    with tempfile.TemporaryDirectory() as data_dir:
        options = ("--kernels", "xla", "--slots", _SLOTS, "--preset", preset)
        with running_service(*options, "--data-dir", data_dir) as service:

            def generate(prompts, num_new_tokens):
                asks = [Ask(tuple(prompt), num_new_tokens) for prompt in prompts]
                records = asyncio.run(together(service.url, asks))
                return [record.token_ids for record in records]

            serve(generate, ("jax",))


if __name__ == "__main__":
    main(sys.argv[1])
