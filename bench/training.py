"""Training, alone and in company: ``python -m bench.training [--only PARTS] [--quick]``.

All on `gemma3_270m`, each part on whom it compares in turns within one run; prints Markdown tables.

    together   four jobs of short rows at once and one after another, the trainer in a bare loop
    peft       one job beside transformers + PEFT, which has an environment of its own
    memory     what the worker grows by while the default job trains
    service    a job over HTTP and the trainer in a bare loop
    version    from the event of a version to an answer that it changed
    serving    four streams and four jobs, each alone and beside each other
"""

import argparse
import os
import signal
import statistics
import sys
from collections.abc import Callable
from functools import cache, partial

from bench import training_engine as bare
from bench.environments import default_directory, environment
from bench.model_files import model_files
from bench.peer_process import PeerProcess
from bench.run_options import Services, stage
from bench.training_beside import measure_serving
from bench.training_service import measure_memory, measure_service, measure_version
from model.engine import GemmaEngine

_BATCHES = (1, 2, 8)
_ASKED_TOGETHER = {1: 2.0, 2: 1.4, 8: 1.0}
_ROW_TOKENS = (16, 64, 128)


@cache
def _engine() -> GemmaEngine:
    stage("loading the model for a bare loop")
    return bare.bench_engine()


def measure_together(quick: bool) -> list[str]:
    """Four jobs of 32 rows of 16 tokens."""
    trainer = _engine().trainer
    assert trainer is not None, "the settings have slots for adapters"
    lines = ["| batch_size | one after another, s | together, s | ratio | asked |"]
    lines += ["|---|---|---|---|---|"]
    num_rows = 8 if quick else 32
    for batch_size in _BATCHES:
        stage(f"four jobs at batch_size {batch_size}, one after another and together")
        plans = [
            bare.plan(
                f"{number}",
                bare.rows(num_rows, 16, f"{number}"),
                batch_size,
                -(-num_rows // batch_size),
            )
            for number in range(4)
        ]
        apart = sum(bare.seconds_of(trainer, [plan])[0] for plan in plans)
        together, _ = bare.seconds_of(trainer, plans)
        lines.append(
            f"| {batch_size} | {apart:.1f} | {together:.1f} | {apart / together:.2f} × "
            f"| {_ASKED_TOGETHER[batch_size]:.1f} × |"
        )
        stage(lines[-1])
    return lines


def measure_peft(quick: bool) -> list[str]:
    """Steps of one job at several batch sizes and lengths, ours and theirs in turns."""
    trainer = _engine().trainer
    assert trainer is not None, "the settings have slots for adapters"
    directory = default_directory()
    stage("environment and weights of transformers + PEFT")
    python = environment("transformers", directory)
    files = model_files(directory / "models")
    lines = ["| rows × tokens | ours, tokens/s | PEFT, tokens/s | ratio (asked: 1.5) |"]
    lines += ["|---|---|---|---|"]
    steps, rounds = (2, 1) if quick else (3, 2)
    log = directory / "peft.log"
    with PeerProcess(python, "run_peft.py", [os.fspath(files.hugging_face)], log) as peer:
        versions = peer.versions()
        for num_tokens in _ROW_TOKENS:
            for batch_size in _BATCHES:
                stage(f"{batch_size} rows of {num_tokens} tokens, in turns with PEFT")
                texts = bare.rows(batch_size, num_tokens, f"{num_tokens}")
                ours: list[float] = []
                theirs: list[float] = []
                for _ in range(rounds):
                    plan = bare.plan("peft", texts, batch_size, steps)
                    ours += bare.seconds_of(trainer, [plan])[1]
                    theirs += peer.ask(
                        {
                            "rows": texts,
                            "num_trained": bare.NUM_TRAINED,
                            "steps": steps,
                            "rank": bare.RANK,
                            "targets": list(bare.TARGETS),
                        }
                    )["seconds"]
                count = batch_size * num_tokens
                own, other = (count / statistics.median(each) for each in (ours, theirs))
                lines.append(
                    f"| {batch_size} × {num_tokens} | {own:.0f} | {other:.0f} "
                    f"| {own / other:.2f} × |"
                )
                stage(lines[-1])
    return [*lines, "", ", ".join(f"{name} {version}" for name, version in versions.items())]


def _bare_steps(batch_size: int, num_steps: int) -> list[float]:
    trainer = _engine().trainer
    assert trainer is not None, "the settings have slots for adapters"
    texts = bare.rows(batch_size * 2, 32, "service")
    return bare.seconds_of(trainer, [bare.plan("bare", texts, batch_size, num_steps)])[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--only", default="", help="parts between commas")
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    # Ended from outside it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    with Services() as services:
        service = partial(services.for_streams, 4)
        parts: dict[str, Callable[[], list[str]]] = {
            "together": partial(measure_together, quick),
            "peft": partial(measure_peft, quick),
            "memory": lambda: measure_memory(service()),
            "service": lambda: measure_service(service(), _bare_steps, quick),
            "version": lambda: measure_version(service(), quick),
            "serving": lambda: measure_serving(service(), quick),
        }
        chosen = arguments.only.split(",") if arguments.only else list(parts)
        for name in chosen:
            before = os.getloadavg()[0]
            lines = parts[name]()
            load = f"Load {before:.1f} before, {os.getloadavg()[0]:.1f} after."
            sys.stdout.write("\n".join([f"\n## {name}", "", *lines, "", load]) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
