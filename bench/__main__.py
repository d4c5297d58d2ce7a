"""The bench of the engine: ``make bench``, or ``python -m bench --help`` in the environment.

Drives the running service over HTTP and, in the same run, other implementations on the same
weights. Each part is kept in ``engine.json`` when it is done; the table of docs/benchmarks.md and
the plot are made anew from all that is there.
"""

import argparse
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import (
    part_closed,
    part_first,
    part_gaps,
    part_open,
    part_peers,
    part_prefix,
    part_start,
    results,
)
from bench.benchmarks_page import PAGE, with_report
from bench.environments import default_directory, environment
from bench.peer_process import PeerFailed
from bench.report import report
from bench.run_options import RunOptions, Services, stage
from bench.summary import Target

_DOCS = PAGE.parent / "benchmarks"
_PARTS: dict[str, Callable[[RunOptions, Services], dict[str, Any]]] = {
    "start": part_start.measure,
    "first": part_first.measure,
    "closed": part_closed.measure,
    "gaps": part_gaps.measure,
    "prefix": part_prefix.measure,
    "open": part_open.measure,
}
_PEERS = "peers"
# Peers that a quick run leaves out.
_ONLY_IN_FULL = {"llama-cpp-f16"}


def main() -> None:
    arguments = _parse(sys.argv[1:])
    options = _options(arguments)
    output = arguments.output or (options.environments / "quick" if options.quick else _DOCS)
    failed = []
    # Ended from outside it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    if not arguments.report:
        failed = _measure(options, arguments.only, output / "engine.json")
    _write_report(options, output)
    if failed:
        sys.exit(f"failed, so without new figures: {', '.join(failed)}")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shows that all works, in minutes")
    parser.add_argument(
        "--only",
        type=_names_among([*_PARTS, _PEERS]),
        default=[*_PARTS, _PEERS],
        help=f"parts between commas: {', '.join([*_PARTS, _PEERS])}",
    )
    parser.add_argument(
        "--peers",
        type=_names_among(part_peers.PEERS),
        help=f"peers between commas: {', '.join(part_peers.PEERS)}",
    )
    parser.add_argument("--rates", type=_numbers, help="requests per second of the open loop")
    parser.add_argument("--window-seconds", type=float, help="of the open loop at each rate")
    parser.add_argument("--first-token-seconds", type=float, default=2.0, help="of a good answer")
    parser.add_argument("--median-gap-seconds", type=float, default=0.15, help="of a good answer")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    parser.add_argument(
        "--environments",
        type=Path,
        default=default_directory(),
        help="folder for the peers' packages and model files, 9 GB",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for engine.json, engine.png and engine.md; by default docs/benchmarks and its "
        "page, or a folder among the environments with --quick",
    )
    parser.add_argument(
        "--report", action="store_true", help="measure nothing, write the report again"
    )
    return parser.parse_args(words)


def _names_among(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not among {', '.join(known)}")
        return chosen

    return names


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def _options(arguments: argparse.Namespace) -> RunOptions:
    quick = arguments.quick
    peers = [name for name in part_peers.PEERS if not (quick and name in _ONLY_IN_FULL)]
    return RunOptions(
        quick=quick,
        rates=arguments.rates or ((1.0,) if quick else (0.25, 0.5, 1.0, 2.0)),
        window_seconds=arguments.window_seconds or (10.0 if quick else 30.0),
        target=Target(arguments.first_token_seconds, arguments.median_gap_seconds),
        peers=tuple(arguments.peers or peers),
        environments=arguments.environments.absolute(),
        seed=arguments.seed,
    )


def _measure(options: RunOptions, parts: Sequence[str], path: Path) -> list[str]:
    """Every part that was asked for, each kept as soon as it is done; those that failed."""
    run = results.describe_run(quick=options.quick)
    measures = {name: measure for name, measure in _PARTS.items() if name in parts}
    if _PEERS in parts:
        for peer in options.peers:
            measures[f"{_PEERS}/{peer}"] = partial(part_peers.measure, name=peer)
    failed = []
    with Services() as services:
        for name, measure in measures.items():
            try:
                results.keep(path, name, run, measure(options, services))
            except Exception:
                # Whatever it died of, the others are measured, and by services of their own.
                traceback.print_exc()
                stage(f"{name} failed")
                failed.append(name)
                services.stop()
    return failed


def _write_report(options: RunOptions, output: Path) -> None:
    """Markdown and the plot, into the page if these are its figures."""
    parts = results.read(output / "engine.json")
    text = report(parts)
    sys.stdout.write(text)
    is_page = output.resolve() == _DOCS.resolve()
    if _draw(options, output, parts):
        folder = f"{_DOCS.name}/" if is_page else ""
        text = f"![The figures below, drawn]({folder}engine.png)\n\n{text}"
    if is_page:
        PAGE.write_text(with_report(PAGE.read_text(), text))
    else:
        (output / "engine.md").write_text(text)


def _draw(options: RunOptions, output: Path, parts: Iterable[str]) -> bool:
    """Whether there is a plot of these parts now."""
    if not any(name == "open" or name.startswith(f"{_PEERS}/") for name in parts):
        return False
    try:
        python = environment("plot", options.environments)
    except PeerFailed as failure:
        stage(f"no plot: {failure}")
        return False
    script = Path(__file__).parent / "plot.py"
    subprocess.run([python, script, output / "engine.json", output / "engine.png"], check=True)
    return True


if __name__ == "__main__":
    main()
